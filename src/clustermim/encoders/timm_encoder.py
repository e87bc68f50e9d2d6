"""Any timm model as an encoder: a ViT with its layers, a CNN with its feature map as patches."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from clustermim.encoders.contract import Encoder, EncoderOutput
from clustermim.errors import InputError


class TimmEncoder(Encoder):
    """A timm model behind the encoder contract.

    `cls` is what `model(images)` gives with its classifier taken off: the class token, or whatever else the model
    pools; it is left out where that is the mean of the patches. `patches` is the last feature map. `layers` are what
    timm's `forward_intermediates` calls so: the blocks of a ViT, the stages of a CNN.

    Parameters
    ----------
    model
        Built with `num_classes=0`; it is put into evaluation mode.
    name
        What tables call it.
    image_size
        (height, width) it needs; None for a CNN that takes any size.
    channels
        Channels of its first layer.
    mean, std
        What it was trained with.

    Raises
    ------
    InputError
        The model gives no features for images of this size.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        *,
        image_size: tuple[int, int] | None,
        channels: int,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        stepwise: Any = getattr(model, "forward_intermediates", None)
        depth = max(1, len(getattr(model, "feature_info", []))) if stepwise else 1
        super().__init__(name, image_size=image_size, channels=channels, depth=depth, mean=mean, std=std)
        self.model: Any = model.eval()
        self._prefix = int(getattr(model, "num_prefix_tokens", 0))
        self._channels_last = getattr(model, "output_fmt", None) == "NHWC"
        self._class_token = self._prefix > 0 and getattr(model, "cls_token", None) is not None
        self._returns_prefix = stepwise and "return_prefix_tokens" in inspect.signature(stepwise).parameters
        self._pools_patches = False
        size = image_size or _declared_size(model) or (224, 224)
        try:
            with torch.no_grad():
                # One pseudo-image shows whether the model pools by a plain mean: cls and mean would be one row twice.
                ramp = torch.linspace(0, 1000, channels * size[0] * size[1]).cos().view(1, channels, *size)
                output = self.encode(ramp.to(self._mean.device), [depth - 1])[0]
        except (RuntimeError, AssertionError, ValueError, TypeError) as error:
            raise InputError(
                f"{name} gives no features for {size[0]} × {size[1]} pixels and {channels} channel(s): {error}"
            ) from error
        if output.cls is not None and output.patches is not None:
            average = output.patches.mean(dim=1)
            self._pools_patches = average.shape == output.cls.shape and torch.allclose(
                average, output.cls, rtol=1e-4, atol=1e-5
            )

    def encode(self, images: Tensor, which: Sequence[int]) -> list[EncoderOutput]:
        """Features of normalised images at the layers `which`, in one pass."""
        last = self.depth - 1
        inner = sorted(set(which) - {last})
        if not inner:
            final, outputs = self.model.forward_features(images), {}
        else:
            options: dict[str, Any] = {"return_prefix_tokens": True} if self._returns_prefix and self._prefix else {}
            final, steps = self.model.forward_intermediates(
                images, indices=inner, norm=True, output_fmt="NCHW", **options
            )
            outputs = {layer: self._intermediate(step) for layer, step in zip(inner, steps, strict=True)}
        if last in which:
            outputs[last] = self._final(final)
        return [outputs[layer] for layer in which]

    def patch_grid(self, height: int, width: int) -> tuple[int, int] | None:
        """Patches down and across for images of this size; None where the patches are not on a grid."""
        images = torch.zeros(1, self.channels, height, width, device=self._mean.device)
        with torch.no_grad():
            final = self.model.forward_features(images)
        if final.ndim == 4:
            return (final.shape[1], final.shape[2]) if self._channels_last else (final.shape[2], final.shape[3])
        embed = getattr(self.model, "patch_embed", None)
        if not hasattr(embed, "dynamic_feat_size"):
            return None
        rows, columns = embed.dynamic_feat_size((height, width))  # type: ignore[union-attr]
        return int(rows), int(columns)

    def _final(self, final: Tensor) -> EncoderOutput:
        pooled = self.model.forward_head(final, pre_logits=True).flatten(1)
        patches = final
        if final.ndim == 4:
            patches = final.flatten(1, 2) if self._channels_last else flatten_map(final)
        elif final.ndim == 3:
            patches = final[:, self._prefix :]
        else:
            return EncoderOutput(cls=pooled, patches=None)
        return EncoderOutput(cls=None if self._pools_patches else pooled, patches=patches)

    def _intermediate(self, step: Tensor | tuple[Tensor, Tensor]) -> EncoderOutput:
        if isinstance(step, Tensor):
            return EncoderOutput(cls=None, patches=flatten_map(step))
        patches, prefix = step
        # Only where the model pools by its class token has that token the same meaning in all layers.
        by_token = self._class_token and getattr(self.model, "global_pool", None) == "token"
        return EncoderOutput(cls=prefix[:, 0] if by_token else None, patches=flatten_map(patches))


def flatten_map(features: Float[Tensor, "b d h w"]) -> Float[Tensor, "b n d"]:
    """A feature map as patches in row-major order."""
    return features.flatten(2).transpose(1, 2)


def declared_statistics(model: nn.Module, channels: int) -> tuple[list[float], list[float]]:
    """The mean and standard deviation a timm model was trained with; their average where it has other channels."""
    config = getattr(model, "pretrained_cfg", None) or {}
    return _fit(config.get("mean") or [0.0], channels), _fit(config.get("std") or [1.0], channels)


def _fit(values: Sequence[float], channels: int) -> list[float]:
    return list(values) if len(values) == channels else [sum(values) / len(values)] * channels


def _declared_size(model: nn.Module) -> tuple[int, int] | None:
    size = (getattr(model, "pretrained_cfg", None) or {}).get("input_size")
    return None if size is None else (int(size[1]), int(size[2]))
