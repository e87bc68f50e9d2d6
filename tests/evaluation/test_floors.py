"""The bag-of-tokens floor against a naive count, and what it refuses."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clustermim.data.sources import open_splits
from clustermim.errors import InputError
from clustermim.evaluation.evaluating import evaluate
from clustermim.evaluation.floors import BagOfTokens, bag_of_tokens, open_any
from clustermim.tokenizers.tokenizer import Tokenizer


class Brightness(Tokenizer):
    """Tokens by the mean grey of a patch: darkest 0."""

    kind = "brightness"

    def tokens(self, images: torch.Tensor, index: object, labels: object) -> torch.Tensor:
        patch = self.patch_size
        means = torch.nn.functional.avg_pool2d(images.mean(1, keepdim=True), patch).flatten(1)
        return (means * self.vocab_size).long().clamp(max=self.vocab_size - 1)


class Cheating(Brightness):
    """One that asks for labels."""

    kind = "cheating"
    requires = frozenset({"labels"})


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.integers(1, 6), st.integers(0, 2**31))
def test_bag_equals_a_naive_count(batch: int, rows: int, columns: int, k: int, seed: int) -> None:
    ids = torch.randint(k, (batch, rows * columns), generator=torch.Generator().manual_seed(seed))
    bag = bag_of_tokens(ids, (rows, columns), k)
    for image in range(batch):
        for down in range(2):
            for across in range(2):
                inside = [
                    int(ids[image, r * columns + c])
                    for r in range(rows)
                    for c in range(columns)
                    if (2 * r // rows, 2 * c // columns) == (down, across)
                ]
                expected = [(inside.count(t) / max(1, len(inside))) ** 0.5 for t in range(k)]
                start = (2 * down + across) * k
                torch.testing.assert_close(bag[image, start : start + k], torch.tensor(expected))


def make_tokenizer(kind: type[Tokenizer] = Brightness, channels: int = 1, size: int = 8, patch: int = 2) -> Tokenizer:
    return kind({"vocab_size": 6, "patch_size": patch, "channels": channels, "image_size": [size, size]})


def test_a_tokenizer_is_judged_as_its_bag() -> None:
    train, test = open_splits("digits")
    floor = open_any(make_tokenizer(), train.view)
    assert isinstance(floor, BagOfTokens) and floor.name == "bag-of-tokens:brightness"
    rows = evaluate(floor, train, test)
    assert {row["pool"] for row in rows} == {"bag"} and {row["dim"] for row in rows} == {24}
    assert all(row["top1"] > 0.6 for row in rows)


def test_what_is_refused(tmp_path: Path) -> None:
    train, _ = open_splits("digits")
    with pytest.raises(InputError, match="depend on each image's labels"):
        open_any(make_tokenizer(Cheating), train.view)
    with pytest.raises(InputError, match="channel"):
        open_any(make_tokenizer(channels=3), train.view)
    with pytest.raises(InputError, match="nowhere"):
        open_any(f"bag-of-tokens:{tmp_path / 'nowhere'}", train.view)
    with pytest.raises(InputError, match="Did you mean 'bag-of-tokens:'"):
        open_any("bag-of-token:x", train.view)
    with pytest.raises(InputError, match="pass `view`"):
        open_any("bag-of-tokens:x")
