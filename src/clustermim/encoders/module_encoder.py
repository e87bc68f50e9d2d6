"""Any `torch.nn.Module` as an encoder: what it returns is told from its shape."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from clustermim.encoders.contract import Encoder, EncoderOutput
from clustermim.encoders.timm_encoder import flatten_map
from clustermim.errors import InputError


class ModuleEncoder(Encoder):
    """A module that is no timm model; it is given images in [0, 1] and normalises them itself.

    It may return (B, D), a global vector; (B, N, D), patches; (B, D, h, w), a feature map; or a pair of a global vector
    and one of the two others.

    Parameters
    ----------
    module
        Put into evaluation mode.
    name
        What tables call it.
    channels
        Channels it takes.
    image_size
        (height, width) it needs; None if any will do.
    """

    def __init__(
        self, module: nn.Module, name: str, *, channels: int, image_size: tuple[int, int] | None = None
    ) -> None:
        super().__init__(name, image_size=image_size, channels=channels)
        self.module = module.eval()

    def encode(self, images: Tensor, which: Sequence[int]) -> list[EncoderOutput]:
        """What the module returns, sorted by shape; InputError when it fits none of the forms."""
        output = self._sort(self.module(images))
        return [output for _ in which]

    def _sort(self, returned: Any) -> EncoderOutput:
        if isinstance(returned, EncoderOutput):
            return returned
        if isinstance(returned, Tensor) and returned.ndim == 2:
            return EncoderOutput(cls=returned, patches=None)
        if isinstance(returned, Tensor) and returned.ndim in (3, 4):
            return EncoderOutput(cls=None, patches=returned if returned.ndim == 3 else flatten_map(returned))
        if isinstance(returned, tuple) and len(returned) == 2:
            whole, parts = (self._sort(part) for part in returned)
            if whole.cls is not None and parts.patches is not None:
                return EncoderOutput(cls=whole.cls, patches=parts.patches)
        found = tuple(returned.shape) if isinstance(returned, Tensor) else type(returned).__name__
        raise InputError(
            f"{self.name} returned {found}, not an encoder's output: expected (B, D), (B, N, D), (B, D, h, w), "
            f"or a pair of a global (B, D) and one of the others."
        )
