"""What is exported: the encoder of a run, what its manifest says, and how an export is compared with it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from jaxtyping import Float
from torch import Tensor

from clustermim.encoders.building import open_run
from clustermim.encoders.contract import EncoderOutput
from clustermim.encoders.timm_encoder import TimmEncoder
from clustermim.errors import InputError
from clustermim.runs import read_manifest


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The encoder of one run."""

    run: Path
    encoder: TimmEncoder
    manifest: dict[str, Any]

    @property
    def settings(self) -> dict[str, Any]:
        """What its config.yaml says, empty where there is none."""
        file = self.run / "config.yaml"
        found = yaml.safe_load(file.read_text()) if file.is_file() else None
        return found if isinstance(found, dict) else {}

    @property
    def mean(self) -> list[float]:
        """Of each channel, for images in [0, 1]."""
        return self._statistic("mean")

    @property
    def std(self) -> list[float]:
        """Of each channel, for images in [0, 1]."""
        return self._statistic("std")

    def _statistic(self, name: str) -> list[float]:
        values = [float(value) for value in self.manifest["data"][name]]
        return values * self.encoder.channels if len(values) == 1 else values

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        assert self.encoder.image_size is not None  # a run always knows it
        return self.encoder.image_size

    def images(self, count: int = 2) -> Float[Tensor, "b c h w"]:
        """Images of noise in [0, 1], the same every time, on which an export must agree with the encoder."""
        generator = torch.Generator().manual_seed(0)
        return torch.rand(count, self.encoder.channels, *self.image_size, generator=generator)

    def difference(self, forward: Callable[[Float[Tensor, "b c h w"]], EncoderOutput], count: int = 2) -> float:
        """The largest absolute difference of class token and patches between `forward` and the encoder.

        Parameters
        ----------
        forward
            The export: images in [0, 1] -> features; what it leaves out (None) is not compared.
        count
            Images to compare on.
        """
        images = self.images(count)
        with torch.no_grad():
            ours, theirs = self.encoder(images), forward(images)
        largest = 0.0
        for mine, other in zip(ours, theirs, strict=True):
            if mine is not None and other is not None:
                if mine.shape != other.shape:
                    return float("inf")
                largest = max(largest, float((mine - other).abs().max()))
        return largest


def open_subject(run: str | Path) -> Subject:
    """The encoder of a run directory, with its manifest.

    Raises
    ------
    InputError
        It is no run directory with an encoder.
    """
    manifest = read_manifest(run)
    return Subject(run=Path(run), encoder=open_run(Path(run)), manifest=manifest)


def check_difference(difference: float, most: float, where: str) -> None:
    """Refuse an export that does not give the same features.

    Raises
    ------
    InputError
        The difference is larger than `most`.
    """
    if not difference <= most:
        raise InputError(
            f"The export to {where} gives other features than the run (largest difference {difference:.2g}, allowed "
            f"{most:.0e}), so it was not kept. Please report it with the versions of torch and of the library."
        )
