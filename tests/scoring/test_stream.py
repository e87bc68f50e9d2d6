"""One pass over a stream scores as the ids themselves do; stored ids too; comparisons and advice follow the scores."""

from pathlib import Path

import numpy as np
import pytest
import torch

from clustermim.data.loaders import Batch
from clustermim.errors import InputError
from clustermim.scoring import counts
from clustermim.scoring.advice import advise, with_interval
from clustermim.scoring.comparing import compare
from clustermim.scoring.counts import TokenCounts
from clustermim.scoring.folds import plan_images
from clustermim.scoring.stored import open_ids
from clustermim.scoring.stream import count_ids, count_stream, score_stream
from clustermim.scoring.tcas import score_counts, score_tokens
from forking import in_group


class Lookup:
    """A tokenizer that knows the ids of every image."""

    def __init__(self, ids, vocab_size):
        self.ids, self.vocab_size = torch.from_numpy(ids), vocab_size

    def encode(self, images, *, index=None, labels=None):
        assert images.shape[0] == len(labels)
        return self.ids[index]


def weak_tokens(rng, labels, vocab, pull, patches=16):
    ids = rng.integers(0, vocab, (len(labels), patches))
    return np.where(rng.random(ids.shape) < pull, labels[:, None] % vocab, ids)


@pytest.fixture(scope="module")
def sample():
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(4), [30, 40, 50, 80]))
    return labels, {
        "good": weak_tokens(rng, labels, 10, 0.5),
        "weak": weak_tokens(rng, labels, 50, 0.1),
        "random": rng.integers(0, 8, (200, 16)),
    }


def batches(labels, size=32):
    order = np.random.default_rng(1).permutation(len(labels))
    for start in range(0, len(labels), size):
        index = torch.from_numpy(order[start : start + size])
        yield Batch(torch.zeros(len(index), 1, 2, 2), index, torch.from_numpy(labels)[index])


def figures_of(score):
    return {k: v for k, v in score.to_dict().items() if isinstance(v, float) and not k.startswith("seconds")}


def test_one_pass_scores_all_tokenizers_as_their_ids_do(sample):
    labels, ids = sample
    seen = []
    tokenizers = {name: Lookup(x, 100) for name, x in ids.items()}
    scores = score_stream(tokenizers, batches(labels), labels, bootstrap=20, on_batch=seen.append)
    assert sum(seen) == 200 and list(scores) == list(ids)
    for name, score in scores.items():
        alone = score_tokens(ids[name], labels, vocab_size=100, bootstrap=20)
        assert figures_of(score) == pytest.approx(figures_of(alone), abs=1e-12)
        assert score.seconds_tokenizing >= 0 and score.seconds_counting > 0
    with pytest.raises(InputError, match="no tokenizer"):
        score_stream({}, batches(labels), labels)


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("vocab", [100, 10**7])
def test_counts_of_parts_merge_into_those_of_the_whole(sample, per_image, vocab):
    labels, ids = sample
    plan = plan_images(labels)
    parts = [TokenCounts(plan, vocab, per_image=per_image) for _ in range(2)]
    rows = torch.from_numpy(ids["weak"])
    for part, index in zip(parts, (torch.arange(120), torch.arange(120, 200)), strict=True):
        part.update(rows[index], None, index)
    parts[0].merge(parts[1])
    whole = score_tokens(ids["weak"], labels, vocab_size=vocab)
    assert figures_of(score_counts(parts[0])) == pytest.approx(figures_of(whole), abs=1e-12)
    with pytest.raises(InputError, match="counted twice"):
        parts[0].merge(parts[1])
    with pytest.raises(InputError, match="one tokenizer"):
        parts[0].merge(TokenCounts(plan, vocab + 1, per_image=per_image))


def counted_together(rank, labels, ids, vocab, per_image):
    """One of three processes; the third is given no image."""
    plan = plan_images(labels)
    mine = list(batches(labels))[rank::2] if rank < 2 else []
    stream = count_stream({"weak": Lookup(ids, vocab)}, mine, plan, per_image=per_image)
    score = stream.scores(bootstrap=10 if per_image else 0)["weak"]
    return figures_of(score), score.intervals


@pytest.mark.parametrize(("vocab", "per_image"), [(50, False), (10**7, False), (50, True)])
def test_processes_that_share_the_images_get_the_score_of_all(sample, tmp_path, vocab, per_image):
    labels, ids = sample
    found = in_group(lambda rank: counted_together(rank, labels, ids["weak"], vocab, per_image), 3, tmp_path)
    alone = score_tokens(ids["weak"], labels, vocab_size=vocab, bootstrap=10 if per_image else 0)
    for figures, intervals in found:
        assert figures == pytest.approx(figures_of(alone), abs=1e-12)
        assert intervals == {name: pytest.approx(pair, abs=1e-12) for name, pair in alone.intervals.items()}


def twice(labels, ids):
    with pytest.raises(InputError, match="its own part"):
        count_stream({"weak": Lookup(ids, 50)}, batches(labels), plan_images(labels))


def test_processes_that_count_the_same_images_are_told(sample, tmp_path):
    labels, ids = sample
    in_group(lambda rank: twice(labels, ids["weak"]), 2, tmp_path)


def test_batches_and_blocks_decide_nothing(sample, monkeypatch):
    labels, ids = sample
    expected = figures_of(score_tokens(ids["weak"], labels, vocab_size=50))
    for block in (1, 700, 10**6):
        monkeypatch.setattr(counts, "BLOCK_IDS", block)
        for per_image in (False, True):
            stream = count_stream(
                {"weak": Lookup(ids["weak"], 50)}, batches(labels, 7), plan_images(labels), per_image=per_image
            )
            assert figures_of(stream.scores()["weak"]) == pytest.approx(expected, abs=1e-12)
            assert stream.seconds_reading > 0


def test_images_may_differ_in_their_number_of_patches(sample):
    labels, ids = sample
    plan = plan_images(labels)
    mixed = TokenCounts(plan, 50, per_image=True)
    for index in torch.arange(200).split(50):
        mixed.update(torch.from_numpy(ids["weak"])[index, : 3 + int(index[0]) % 4], None, index)
    rows = mixed.rows()
    assert rows.matrix.sum(axis=1).A1.tolist() == [3.0] * 50 + [5.0] * 50 + [3.0] * 50 + [5.0] * 50


def save(path: Path, **arrays):
    path.parent.mkdir(exist_ok=True)
    np.savez(path, **arrays)
    return path


def scored(stored):
    return score_counts(count_ids(stored.parts(), plan_images(stored.labels), stored.vocab_size))


def test_stored_ids_score_as_they_are_from_one_file_or_several(sample, tmp_path):
    labels, ids = sample
    x = ids["weak"].astype(np.int32)
    expected = figures_of(score_tokens(x, labels, vocab_size=60))
    one = open_ids(save(tmp_path / "one.npz", ids=x, labels=labels, index=np.arange(200), vocab_size=60))
    assert figures_of(scored(one)) == pytest.approx(expected, abs=1e-12)
    for i, part in enumerate((slice(0, 70), slice(70, 200))):
        save(
            tmp_path / "many" / f"{i}.npz", ids=x[part], labels=labels[part], index=np.arange(200)[part], vocab_size=60
        )
    assert figures_of(scored(open_ids(tmp_path / "many"))) == pytest.approx(expected, abs=1e-12)
    assert open_ids(save(tmp_path / "bare.npz", ids=x, labels=labels)).vocab_size == x.max() + 1


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"labels": [0, 1]}, "no array `ids`"),
        ({"ids": np.zeros((2, 3), dtype=int)}, "no labels"),
        ({"ids": np.zeros((2, 3)), "labels": [0, 1]}, "must be integers"),
        ({"ids": np.zeros(2, dtype=int), "labels": [0, 1]}, "shape"),
        ({"ids": np.zeros((2, 3), dtype=int), "labels": [0, 1, 1]}, "2 images have ids but `labels` has 3"),
        ({"ids": np.zeros((2, 3), dtype=int), "labels": [0, 1], "index": [4, 4]}, "occurs twice"),
    ],
)
def test_stored_ids_that_cannot_be_scored_are_refused(tmp_path, arrays, message):
    with pytest.raises(InputError, match=message):
        open_ids(save(tmp_path / "bad.npz", **arrays))


def test_stored_ids_that_are_not_there_or_do_not_belong_together(tmp_path):
    with pytest.raises(InputError, match="no stored ids"):
        open_ids(tmp_path / "none.npz")
    with pytest.raises(InputError, match=r"no \.npz file"):
        open_ids(tmp_path)
    (tmp_path / "text.npz").write_text("not a zip")
    with pytest.raises(InputError, match="cannot be read"):
        open_ids(tmp_path / "text.npz")
    for i in range(2):
        save(tmp_path / "mixed" / f"{i}.npz", ids=np.zeros((1, 2), dtype=int), labels=[i], index=[i], vocab_size=5 + i)
    with pytest.raises(InputError, match="different tokenizers"):
        open_ids(tmp_path / "mixed")


def test_a_better_tokenizer_is_found_better_and_the_comparison_is_antisymmetric(sample):
    labels, ids = sample
    scores = {name: score_tokens(x, labels, bootstrap=200) for name, x in ids.items()}
    forth, back = (compare(scores[a], scores[b]) for a, b in (("good", "random"), ("random", "good")))
    assert forth.probability > 0.99 and forth.low > 0 and forth.low < forth.difference < forth.high
    assert back.difference == -forth.difference and back.probability == pytest.approx(1 - forth.probability)
    worse = compare(scores["good"], scores["random"], "labelling_error_crossfit")
    assert worse.difference < 0 and worse.probability > 0.99
    itself = compare(scores["weak"], scores["weak"])
    assert itself.difference == 0 and itself.probability == 0.5 and itself.low == itself.high == 0


def test_the_pair_is_tighter_than_its_parts(sample):
    labels, ids = sample
    nearly = ids["good"].copy()
    nearly[:, 0] = 0
    a, b = score_tokens(ids["good"], labels, bootstrap=200), score_tokens(nearly, labels, bootstrap=200)
    pair = compare(a, b)
    assert pair.high - pair.low < 0.8 * (a.alignment_crossfit_high - a.alignment_crossfit_low)


def test_scores_that_do_not_pair_are_refused(sample):
    labels, ids = sample
    a = score_tokens(ids["good"], labels, bootstrap=5)
    for other, message in [
        (score_tokens(ids["good"], labels), "bootstrap"),
        (score_tokens(ids["good"], labels, bootstrap=5, seed=1), "seeds"),
        (score_tokens(ids["good"][:150], labels[:150], bootstrap=5), "different images"),
    ]:
        with pytest.raises(InputError, match=message):
            compare(a, other)
    with pytest.raises(InputError, match="Did you mean 'alignment'"):
        compare(a, a, "alignmnt")


def test_advice_names_the_best_and_what_the_images_cannot_show(sample):
    labels, ids = sample
    scores = {name: score_tokens(x, labels, bootstrap=100) for name, x in ids.items()}
    (sentence,) = advise({"good": scores["good"]})
    assert sentence.startswith("good (K=10): alignment " + with_interval(scores["good"], "alignment_crossfit"))
    assert "good (K=10)" in advise(scores)[0] and "best of 3" in advise(scores)[0]
    assert "cannot tell from tokens drawn at random" in advise({"random": scores["random"]})[0]
    assert "Only controls" in advise(scores, controls=set(scores))[0]
    # The same tokens under twice as many names: no better, and told.
    double = ids["good"] * 2 + np.random.default_rng(1).integers(0, 2, ids["good"].shape)
    pair = {"coarse": scores["good"], "fine": score_tokens(double, labels, bootstrap=100)}
    assert "coarse" in advise(pair)[0]
    large = score_tokens(np.arange(3200).reshape(200, 16), labels, bootstrap=100)
    assert any("more than 200 labelled images can judge" in line for line in advise(pair | {"identity": large}))
    single = score_tokens(ids["good"], np.where(np.arange(200) == 0, 9, labels))
    assert "Only plug-in" in advise({"good": single})[0] and with_interval(single, "alignment_crossfit") == "-"
