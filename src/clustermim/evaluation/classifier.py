"""An encoder with a linear classifier on top, as it is fine-tuned: layer-wise learning rates and drop path."""

from typing import Any

import torch
from jaxtyping import Float
from timm.layers.drop import DropPath
from timm.optim._param_groups import param_groups_layer_decay
from torch import Tensor, nn

from clustermim.encoders.contract import Encoder
from clustermim.encoders.timm_encoder import TimmEncoder
from clustermim.errors import InputError
from clustermim.training.optimiser import parameter_groups


class Classifier(nn.Module):
    """Logits from one of the encoder's pools at its last layer.

    Parameters
    ----------
    encoder
        Trained along.
    num_classes
        Number of classes.
    pool
        `mean` of the patches, or the encoder's global vector (`cls`); None takes the mean where there are patches.
    seed
        Of the classifier's weights, which start near 0.

    Raises
    ------
    InputError
        An encoder without weights, or without such a pool.
    """

    def __init__(self, encoder: Encoder, num_classes: int, pool: str | None = None, seed: int = 0) -> None:
        super().__init__()
        if not any(parameter.is_floating_point() for parameter in encoder.parameters()):
            raise InputError(f"{encoder.name} has no weights, so there is nothing to fine-tune: judge it by `probe`.")
        size = encoder.image_size or (32, 32)
        device = next(encoder.parameters()).device
        with torch.no_grad():
            output = encoder.eval()(torch.zeros(1, encoder.channels, *size, device=device))
        vectors = output.pooled(encoder.global_name)
        self.pool = pool or ("mean" if "mean" in vectors else encoder.global_name)
        if self.pool not in vectors:
            raise InputError(f"{encoder.name} has no {self.pool!r} features. Known: {', '.join(vectors)}.")
        self.encoder = encoder
        self.head = nn.Linear(vectors[self.pool].shape[1], num_classes)
        with torch.no_grad():
            self.head.weight.normal_(0, 2e-5, generator=torch.Generator().manual_seed(seed))
            self.head.bias.zero_()

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b l"]:
        """Logits for images in [0, 1]."""
        output = self.encoder.layers(images, [self.encoder.depth - 1])[0]
        vectors = output.pooled(self.encoder.global_name)
        return self.head(vectors[self.pool])  # type: ignore[no-any-return]


def set_drop_path(model: nn.Module, rate: float) -> int:
    """Stochastic depth (Huang et al. 2016): residual branches are dropped at random, the later the more often.

    Parameters
    ----------
    model
        Made without drop path, as timm makes it by default; changed in place.
    rate
        Of the last block; the first has 0, those between lie on a line.

    Returns
    -------
    int
        Blocks that have such branches; 0 where the model knows none.
    """
    blocks = [m for m in model.modules() if any(hasattr(m, name) for name in ("drop_path", "drop_path1", "drop_path2"))]
    for number, block in enumerate(blocks):
        share = rate * number / max(1, len(blocks) - 1)
        for name in ("drop_path", "drop_path1", "drop_path2"):
            if isinstance(getattr(block, name, None), nn.Identity | DropPath):
                setattr(block, name, (DropPath(share) if share > 0 else nn.Identity()).train(block.training))
    return len(blocks)


def layered_groups(classifier: Classifier, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for an optimiser: `lr_scale` falls from 1 at the top by `layer_decay` with each layer below.

    Parameters
    ----------
    classifier
        Its encoder's layers are those that timm's `group_matcher` knows.
    weight_decay
        Of matrices; biases, norms, tokens and positions have none.
    layer_decay
        Factor from one layer to the next below (Clark et al. 2020; Bao et al. 2022); 1 treats all alike.

    Raises
    ------
    InputError
        A model whose layers are not known.
    """
    top = parameter_groups(classifier.head, weight_decay)
    inner: Any = classifier.encoder.model if isinstance(classifier.encoder, TimmEncoder) else classifier.encoder
    if layer_decay == 1.0:
        groups = parameter_groups(inner, weight_decay)
    elif hasattr(inner, "group_matcher"):
        spared = inner.no_weight_decay() if hasattr(inner, "no_weight_decay") else ()
        groups = param_groups_layer_decay(inner, weight_decay, spared, layer_decay=layer_decay)
    else:
        raise InputError(
            f"--layer-decay {layer_decay:g}: the layers of {classifier.encoder.name} are not known, as it is no timm "
            f"model. Use --layer-decay 1."
        )
    return [{"lr_scale": 1.0} | {k: v for k, v in group.items() if k != "param_names"} for group in (*groups, *top)]
