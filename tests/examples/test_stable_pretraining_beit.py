"""Our tokenizer in BEiT-type code that takes a callable: a stand-in, and stable-pretraining's where it is installed."""

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clustermim.tokenizers.tokenizer import Tokenizer
from clustermim.verbs.tokenizer_fit import fit_tokenizer

EXAMPLE = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "stable_pretraining_beit.py"))
TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.fixture
def images() -> np.ndarray:
    """Pictures of two kinds of patches, so that there is something to predict."""
    generator = np.random.default_rng(0)
    dark = generator.integers(0, 2, (64, 1, 1, 1)) * 128
    return (generator.integers(0, 100, (64, 16, 16, 3)) + dark).astype(np.uint8)


def tokenizer_of(images: np.ndarray) -> Tokenizer:
    return fit_tokenizer(images, k=6, patch_size=4)


class StandIn(nn.Module):
    """What a BEiT does with its tokenizer: hold it, call it on the batch without gradients, predict what it says."""

    def __init__(self, encoder: Any, tokenizer: Any, vocab_size: int) -> None:
        super().__init__()
        self.encoder, self.tokenizer = encoder, tokenizer
        self.head = nn.Linear(encoder.embed_dim, vocab_size)

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            targets = self.tokenizer(images)
        logits = self.head(self.encoder.forward_features(images)[:, 1:])
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def test_the_tokenizer_is_the_callable_that_a_beit_takes(images: np.ndarray) -> None:
    tokenizer = tokenizer_of(images)
    encoder = EXAMPLE["make_encoder"](tokenizer, **TINY)
    beit = StandIn(encoder, tokenizer, tokenizer.vocab_size).train()
    batch = torch.from_numpy(images[:8]).permute(0, 3, 1, 2).float() / 255
    ids = tokenizer(batch)
    assert ids.dtype == torch.int64 and ids.shape == (8, 16) and 0 <= int(ids.min()) <= int(ids.max()) < 6
    assert not tokenizer.training, "a tokenizer stays as fitted inside a model that trains"
    before = {key: value.clone() for key, value in tokenizer.state_dict().items()}
    optimiser = torch.optim.AdamW((p for p in beit.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = beit(batch)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    assert all(torch.equal(value, before[key]) for key, value in tokenizer.state_dict().items())
    assert torch.equal(tokenizer(batch), ids)


def test_the_encoder_normalises_by_itself_and_keeps_timms_names(images: np.ndarray) -> None:
    encoder = EXAMPLE["make_encoder"](tokenizer_of(images), **TINY).eval()
    assert "patch_embed.proj.weight" in encoder.state_dict()
    batch = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        seen = encoder.patch_embed(batch)
        by_hand = encoder.patch_embed.proj((batch - 0.5) / 0.5).flatten(2).transpose(1, 2)
    torch.testing.assert_close(seen, by_hand)


def test_stable_pretrainings_beit_learns_our_tokens(images: np.ndarray) -> None:
    pytest.importorskip("stable_pretraining")
    tokenizer = tokenizer_of(images)
    beit = EXAMPLE["make_beit"](tokenizer, EXAMPLE["make_encoder"](tokenizer, **TINY))
    batch = torch.from_numpy(images[:8]).permute(0, 3, 1, 2).float() / 255
    beit.train()
    output = beit(batch)
    assert torch.equal(output.targets, tokenizer(batch)) and output.logits.shape == (8, 16, 6)
    losses = EXAMPLE["train"](beit, tokenizer, images, epochs=4, batch_size=16)
    assert len(losses) == 16 and losses[-1] < losses[0]
