"""Accumulated parts and world sizes give the same training: to the last bits in 64 of them."""

import numpy as np
import pytest

from clustermim.data.options import DataOptions
from clustermim.data.sources import open_source
from clustermim.errors import Stopped
from clustermim.runs import read_metrics
from clustermim.tokenizers.fitting import fit
from clustermim.verbs.pretrain_encoder import pretrain

IMAGES = np.random.default_rng(0).integers(0, 256, (32, 8, 8, 1), dtype=np.uint8)
TINY = {"model": "vit_micro", "batch_size": 16, "device": "cpu", "precision": "64-true", "log_every": 1, "epochs": 2}
TINY |= {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
KINDS = {
    "pixel": {"target": "pixel", "patch_size": 4},
    "token": {"target": "token", "token_weights": "inverse-sqrt", "label_smoothing": 0.1},
    "feature": {"target": "feature", "features": "hog", "patch_size": 4},
}


@pytest.mark.parametrize("kind", KINDS)
def test_accumulated_parts_are_the_large_batch(kind, tmp_path):
    """Losses are means over images that each count alike, whatever the parts; so are weighted ones."""
    options = TINY | KINDS[kind] | {"options": DataOptions(image_size=8)}
    if kind == "token":
        options["tokenizer"] = fit(open_source(IMAGES), patch_size=4, k=5)
    losses = []
    for parts in (1, 4):
        pretrain(IMAGES, out=tmp_path / str(parts), accumulate=parts, **options)
        losses.append([row["loss"] for row in read_metrics(tmp_path / str(parts))])
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    assert losses[0][-1] != losses[0][0]


def test_parts_may_change_when_a_run_is_continued(tmp_path):
    """What is told after running out of memory works: the same losses from smaller parts."""
    options = TINY | KINDS["pixel"]
    pretrain(IMAGES, out=tmp_path / "whole", **options)
    with pytest.raises(Stopped):
        pretrain(IMAGES, out=tmp_path / "parts", max_minutes=0.0, **options)
    pretrain(IMAGES, out=tmp_path / "parts", resume=True, accumulate=2, activation_checkpointing=True, **options)
    whole, parts = ([row["loss"] for row in read_metrics(tmp_path / name)] for name in ("whole", "parts"))
    assert parts == pytest.approx(whole, rel=1e-12)
