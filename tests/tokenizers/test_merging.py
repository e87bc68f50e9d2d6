"""Merging tokens: the cost is the alignment that is lost, the greedy order the true one, and it beats other merges."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clustermim.errors import InputError
from clustermim.scoring.figures import alignment_of
from clustermim.tokenizers import merging
from clustermim.tokenizers.merging import choose_prior_weight, merge_tokens

quick = settings(deadline=None, max_examples=25)


def table(seed, fine=14, classes=3, unseen=0):
    rng = np.random.default_rng(seed)
    counts = rng.poisson(rng.gamma(0.6, 3, (fine, classes)) * rng.pareto(2, (fine, 1)) * (1 + np.arange(classes)))
    counts[np.arange(classes), np.arange(classes)] += 1
    counts[rng.permutation(fine - classes)[:unseen] + classes] = 0
    return counts.astype(np.float64)


def alignment(counts):
    """By the definition: the walk class → token → class, made symmetric."""
    counts = counts[counts.sum(axis=1) > 0]
    prior = counts.sum(axis=0) / counts.sum()
    walk = (counts / counts.sum(axis=0)).T @ (counts / counts.sum(axis=1, keepdims=True))
    return float(alignment_of(walk[None], prior[None])[0])


def merged(counts, groups):
    out = np.zeros((groups.max() + 1, counts.shape[1]))
    np.add.at(out, groups[groups >= 0], counts[groups >= 0])
    return out


def naive_greedy(counts, k):
    """Try all pairs by the definition, again after every merge."""
    parts = [[i] for i in range(len(counts)) if counts[i].sum() > 0]
    while len(parts) > k:
        tried = []
        for a in range(len(parts)):
            for b in range(a + 1, len(parts)):
                rows = [counts[part].sum(axis=0) for n, part in enumerate(parts) if n not in (a, b)]
                tried.append((-alignment(np.stack([*rows, counts[parts[a] + parts[b]].sum(axis=0)])), a, b))
        _, a, b = min(tried)
        parts[a] += parts.pop(b)
    return {frozenset(part) for part in parts}


@quick
@given(st.integers(0, 2**16), st.integers(2, 6), st.integers(0, 3))
def test_greedy_merges_are_those_of_the_naive_search(seed, k, unseen):
    counts = table(seed, 9, 3, unseen)
    k = min(k, int((counts.sum(axis=1) > 0).sum()))
    seen = np.flatnonzero(counts.sum(axis=1) > 0)
    weight = counts[seen].sum(axis=1) / counts.sum()
    prior = counts.sum(axis=0) / counts.sum()
    profile = (counts[seen] / counts[seen].sum(axis=1, keepdims=True) - prior) / np.sqrt(prior)
    owner = merging._agglomerate(profile, weight, k)
    naive = naive_greedy(counts, k)
    found = {frozenset(seen[owner == group].tolist()) for group in range(k)}
    if found != naive:  # equal costs may be told apart by rounding; then what is kept is equal
        groups = np.full(len(counts), -1)
        groups[seen] = owner
        other = np.full(len(counts), -1)
        for group, part in enumerate(naive):
            other[list(part)] = group
        assert alignment(merged(counts, groups)) == pytest.approx(alignment(merged(counts, other)), abs=1e-9)


@quick
@given(st.integers(0, 2**16))
def test_the_closed_form_is_the_alignment_that_a_merge_loses(seed):
    counts = table(seed, 8, 4)
    prior = counts.sum(axis=0) / counts.sum()
    counts = counts[counts.sum(axis=1) > 0]
    profile = (counts / counts.sum(axis=1, keepdims=True) - prior) / np.sqrt(prior)
    costs = merging._Costs(profile, counts.sum(axis=1) / counts.sum())
    for _ in range(3):
        left = np.flatnonzero(costs.alive)
        row = costs.row(int(left[0]))
        for j in left[1:]:
            joined = counts.copy()
            joined[left[0]] += joined[j]
            joined[j] = 0
            lost = alignment(counts) - alignment(joined)
            assert row[j] / (counts.shape[1] - 1) == pytest.approx(lost, abs=1e-10)
        # and again after a merge, in the metric that it left, where no pair that was left alone costs less
        before = [costs.row(int(i)) for i in left[1:-1]]
        costs.merge(int(left[0]), int(left[-1]))
        for i, old in zip(left[1:-1], before, strict=True):
            assert (costs.row(int(i))[left[1:-1]] >= old[left[1:-1]] - 1e-12).all()
        counts[left[0]] += counts[left[-1]]
        counts[left[-1]] = 0


@quick
@given(st.integers(0, 2**16), st.integers(2, 6))
def test_what_is_kept_is_the_alignment_of_the_groups_and_no_more_than_there_was(seed, k):
    counts = table(seed, unseen=4)
    k = min(k, int((counts.sum(axis=1) > 0).sum()))
    found = merge_tokens(counts, k)
    assert found.fine == pytest.approx(alignment(counts), abs=1e-10)
    assert found.kept == pytest.approx(alignment(merged(counts, found.groups)), abs=1e-10)
    assert found.kept <= found.fine + 1e-12
    assert (found.groups[counts.sum(axis=1) == 0] == -1).all()
    mass = merged(counts, found.groups).sum(axis=1)
    assert len(mass) == k and (mass > 0).all() and (np.diff(mass) <= 0).all()
    rng = np.random.default_rng(seed)
    others = [merged(counts, np.where(found.groups < 0, -1, rng.integers(0, k, len(counts)))) for _ in range(20)]
    assert np.median([alignment(other) for other in others]) <= found.kept


@quick
@given(st.integers(0, 2**16), st.floats(0.1, 50))
def test_copies_meet_again_and_names_do_not_matter(seed, scale):
    counts = table(seed, 7)
    counts = counts[counts.sum(axis=1) > 0]
    k = len(counts)
    shares = counts / counts.sum(axis=1, keepdims=True)
    apart = ((shares[:, None] - shares[None]) ** 2).sum(axis=2) + np.eye(k)
    copied = np.concatenate([counts, scale * counts])
    if apart.min() > 1e-6:
        groups = merge_tokens(copied, k).groups
        np.testing.assert_array_equal(groups[:k], groups[k:])
    order = np.random.default_rng(seed).permutation(k)
    if k > 3:
        one, two = merge_tokens(counts, 3), merge_tokens(counts[order], 3)
        assert one.kept == pytest.approx(two.kept, abs=0.05)
        again = merge_tokens(counts, 3)
        np.testing.assert_array_equal(one.groups, again.groups)


def test_relocation_never_lowers_what_is_kept(monkeypatch):
    kept = merge_tokens(table(3, 200, 5), 12).kept
    monkeypatch.setattr(merging, "_relocate", lambda groups, *rest: groups)
    assert merge_tokens(table(3, 200, 5), 12).kept <= kept


def folds_of_images(seed, depth, images=300, patches=20, fine=150, classes=4):
    """Tables of five folds of images whose tokens tell classes by `depth`; also the true shares."""
    rng = np.random.default_rng(seed)
    chances = rng.dirichlet(np.ones(fine)) * np.exp(depth * rng.normal(size=(classes, fine)))
    chances /= chances.sum(axis=1, keepdims=True)
    tables = np.zeros((5, fine, classes))
    for image in range(images):
        drawn = rng.choice(fine, patches, p=chances[image % classes])
        np.add.at(tables[image // classes % 5], (drawn, image % classes), 1.0)
    return tables, chances


def test_the_prior_weighs_more_the_less_tokens_tell():
    weights = [choose_prior_weight(folds_of_images(0, depth)[0]) for depth in (0.0, 0.5, 2.0)]
    assert weights[0] > weights[1] > weights[2]
    assert weights[0] > 100


def test_the_prior_keeps_rare_tokens_from_leading_the_merges():
    """Groups made with the chosen prior keep more of the population's alignment, over several draws."""
    gains = []
    for seed in range(6):
        tables, chances = folds_of_images(seed, 0.6)
        truth = chances.T * 1e6
        kept = []
        for weight in (0.0, choose_prior_weight(tables)):
            groups = merge_tokens(tables.sum(axis=0), 10, prior_weight=weight).groups
            kept.append(alignment(merged(truth, groups)))
        gains.append(kept[1] - kept[0])
    assert np.mean(gains) > 0


@pytest.mark.parametrize(
    ("counts", "k", "told"),
    [
        (table(0), 1, "at least 2"),
        (table(0), 15, "fewer than k = 15"),
        (np.array([[1.0, 0], [2, 0], [3, 0]]), 2, "two classes"),
    ],
)
def test_what_cannot_be_merged_is_told(counts, k, told):
    with pytest.raises(InputError, match=told):
        merge_tokens(counts, k)
