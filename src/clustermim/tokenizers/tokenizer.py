"""The tokenizer contract: images in, one id a patch out; saved as config.json + model.safetensors, as on the hub.

A new kind is one file with a `Tokenizer` subclass and one line in `KINDS`.
"""

import copy
import importlib
import json
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import safetensors.torch
import torch
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from jaxtyping import Float, Int64
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError
from torch import Tensor, nn

from clustermim.data.options import DataOptions
from clustermim.data.views import ViewConfig
from clustermim.encoders.weights import fingerprint_of
from clustermim.errors import InputError, nearest
from clustermim.features.patches import PatchFeatures, check_divides
from clustermim.runs import atomic_save, atomic_write
from clustermim.tokenizers.codebook import Codebook
from clustermim.tokenizers.twolevel import TwoLevelCodebook

Module = TypeVar("Module", bound=nn.Module)

# kind -> class; imported on first use
KINDS = {
    "kmeans": "clustermim.tokenizers.clustered:KMeansTokenizer",
    "aligned": "clustermim.tokenizers.aligned:AlignedTokenizer",
    "vqvae": "clustermim.tokenizers.vqvae.tokenizer:VQVAETokenizer",
    "random-centroids": "clustermim.tokenizers.controls:RandomCentroidsTokenizer",
    "identity": "clustermim.tokenizers.controls:IdentityTokenizer",
    "random": "clustermim.tokenizers.controls:RandomTokenizer",
    "position": "clustermim.tokenizers.controls:PositionTokenizer",
    "oracle": "clustermim.tokenizers.controls:OracleTokenizer",
}

_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
_MADE_BY = "facts"  # key of the config that holds provenance, which no token depends on
_CARD = """---
{{ card_data }}
---
A patch tokenizer made with `clustermim`: `Tokenizer.from_pretrained(..)(images)` gives an integer for each patch.
"""


class Tokenizer(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="clustermim",
    paper_url="https://arxiv.org/abs/2407.09087",
    tags=["masked-image-modeling", "tokenizer"],
    model_card_template=_CARD,
):
    """Gives every patch of an image an integer in [0, K).

    Parameters
    ----------
    config
        JSON-able; see the attributes. Everything under ``"facts"`` is provenance: data, data fingerprint, seed,
        inertia, versions.

    Attributes
    ----------
    kind
        Its name in `KINDS`.
    requires
        What `encode` needs beside the images: any of ``"index"`` and ``"labels"``. Empty for real tokenizers.
    vocab_size
        K.
    patch_size
        Patch side P in pixels.
    channels
        Channels of the images.
    image_size
        (height, width) of the images it was made for; their patch grid follows.
    features, codebook
        What patches are described by, and the centroids; None where a kind has none.
    """

    kind: ClassVar[str] = ""
    requires: ClassVar[frozenset[str]] = frozenset()
    config: dict[str, Any]
    features: PatchFeatures | None
    codebook: Codebook | None

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = {**config, "kind": self.kind}
        try:
            self.vocab_size = int(config["vocab_size"])
            self.patch_size = int(config["patch_size"])
            self.channels = int(config["channels"])
            self.image_size = (int(config["image_size"][0]), int(config["image_size"][1]))
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise InputError(
                f"The config of this {self.kind} tokenizer is incomplete or damaged ({error}). It needs vocab_size, "
                "patch_size, channels and image_size; fit it again."
            ) from None
        self.features = None
        self.codebook = None
        self.eval()

    def code_pictures(self) -> Float[Tensor, "k c p p"] | None:
        """A picture of each token in [0, 1], where the tokenizer can paint one by itself; None where it cannot."""
        return None

    @property
    def batch_invariant(self) -> bool:
        """Whether an image has the same ids in whatever batch it stands, near ties included.

        Its features decide, for ids are those of exact arithmetic on them. False of kinds without features.
        """
        return self.features is not None and self.features.batch_invariant

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across in the images it was made for."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def facts(self) -> dict[str, Any]:
        """Where it comes from: data, data fingerprint, seed, inertia, versions."""
        return dict(self.config.get(_MADE_BY, {}))

    @abstractmethod
    def tokens(
        self,
        images: Float[Tensor, "b c h w"],
        index: Int64[Tensor, " b"] | None,
        labels: Int64[Tensor, " b"] | None,
    ) -> Int64[Tensor, "b n"]:
        """The ids for checked images; whatever `requires` names is there."""

    @torch.no_grad()
    def encode(
        self,
        images: Float[Tensor, "b c h w"],
        *,
        index: Int64[Tensor, " b"] | None = None,
        labels: Int64[Tensor, " b"] | None = None,
    ) -> Int64[Tensor, "b n"]:
        """One id in [0, K) for each patch.

        Parameters
        ----------
        images
            (B, C, H, W) in [0, 1], on the tokenizer's device; H and W need not be those it was made for, but multiples
            of the patch side.
        index
            (B,) place of each image in its source; only where `requires` names it.
        labels
            (B,) class of each image; only where `requires` names it.

        Returns
        -------
        Tensor
            (B, N) int64, patches in row-major order. The same in any precision: autocast is off inside.

        Raises
        ------
        InputError
            Channels or size do not fit, or what `requires` names is missing.
        """
        self.check_images(images)
        given = {"index": index, "labels": labels}
        missing = sorted(name for name in self.requires if given[name] is None)
        if missing:
            raise InputError(
                f"Tokens of kind {self.kind!r} depend on each image's {' and '.join(missing)}: "
                f"call encode(images, {', '.join(f'{name}=..' for name in missing)}), with data that have them."
            )
        with torch.autocast(images.device.type, enabled=False):
            return self.tokens(images, index, labels)

    def forward(
        self,
        images: Float[Tensor, "b c h w"],
        *,
        index: Int64[Tensor, " b"] | None = None,
        labels: Int64[Tensor, " b"] | None = None,
    ) -> Int64[Tensor, "b n"]:
        """`tokenizer(images)` is `tokenizer.encode(images)`."""
        return self.encode(images, index=index, labels=labels)

    def check_images(self, images: Float[Tensor, "b c h w"]) -> None:
        """Check that a batch can be cut into this tokenizer's patches.

        Raises
        ------
        InputError
            Other channels, or a size that the patch side does not divide.
        """
        if images.shape[1] != self.channels:
            raise InputError(
                f"This {self.kind} tokenizer was made for images of {self.channels} channel(s); these have "
                f"{images.shape[1]}. Open them with --channels {self.channels}, or fit a tokenizer on them."
            )
        check_divides(images.shape[2], images.shape[3], self.patch_size)

    def check_matches(self, view: ViewConfig, patch_size: int | None = None) -> None:
        """Check, before any work starts, that views have this tokenizer's channels and patch grid.

        Parameters
        ----------
        view
            What the images will look like.
        patch_size
            Patch side of the model that shall predict the tokens, if there is one.

        Raises
        ------
        InputError
            They differ; says in what, and what to type.
        """
        height, width = self.image_size
        made = f"This {self.kind} tokenizer is for images of {height} × {width} pixels with {self.channels} channel(s)"
        if view.channels != self.channels:
            raise InputError(
                f"{made}; these have {view.channels}. Use --channels {self.channels}, or fit a tokenizer on them."
            )
        if patch_size is not None and patch_size != self.patch_size:
            raise InputError(
                f"{made} in patches of side {self.patch_size}, not {patch_size}. Use --patch-size {self.patch_size} "
                "(the default), or fit a tokenizer with the other."
            )
        if view.image_size != self.image_size:
            rows, columns = (side / self.patch_size for side in view.image_size)
            raise InputError(
                f"{made}, {self.grid[0]} × {self.grid[1]} patches of side {self.patch_size}; these views of "
                f"{view.image_size[0]} × {view.image_size[1]} pixels have {rows:g} × {columns:g}. "
                f"Use --image-size {height} {width}, or fit a tokenizer at this size."
            )

    def fill_options(self, options: DataOptions) -> DataOptions:
        """Data options in which what the user left open (image size, channels) is what this tokenizer needs."""
        return replace(
            options,
            image_size=self.image_size if options.image_size is None else options.image_size,
            channels=self.channels if options.channels is None else options.channels,
        )

    def with_probes(self, probes: int) -> "Tokenizer":
        """A copy that searches so many cells for each patch; its fingerprint differs, as its tokens may.

        Raises
        ------
        InputError
            The tokenizer has no two levels, or fewer cells.
        """
        if not isinstance(self.codebook, TwoLevelCodebook):
            raise InputError(f"--probes {probes}: this tokenizer has no cells to search; leave --probes out.")
        other = copy.deepcopy(self)
        assert isinstance(other.codebook, TwoLevelCodebook)
        other.codebook.probes = probes
        other.config = {**self.config, "probes": probes}
        return other

    def fingerprint(self) -> str:
        """16 hex digits of everything a token depends on: kind, sizes, features, centroids and weights."""
        essence = {key: value for key, value in self.config.items() if key != _MADE_BY}
        return fingerprint_of(essence, self.state_dict())

    def train(self: Module, mode: bool = True) -> Module:
        """Stays in evaluation mode, whatever module it is part of."""
        return nn.Module.train(self, False)

    def rows(self) -> list[dict[str, Any]]:
        """What it is and how it was made, as one flat record."""
        facts = {k: v for k, v in self.facts.items() if isinstance(v, str | int | float | bool)}
        own = {
            "kind": self.kind,
            "vocab_size": self.vocab_size,
            "patch_size": self.patch_size,
            "grid": f"{self.grid[0]}x{self.grid[1]}",
            "channels": self.channels,
            "fingerprint": self.fingerprint(),
        }
        return [own | facts | self._signatures()]

    def _signatures(self) -> dict[str, str]:
        """The failure signatures that its fit found: names and advice; empty where none were looked for."""
        found: list[dict[str, Any]] | None = self.facts.get("signatures")
        if found is None:
            return {}
        names = "; ".join(str(signature["name"]) for signature in found)
        advice = " ".join(str(signature["says"]) for signature in found)
        return {"signatures": names or "none"} | ({"advice": advice} if advice else {})

    def __rich__(self) -> RenderableType:
        """The record as a table of names and values, and below it what is wrong, if anything is."""
        table = Table("", "tokenizer", title=None)
        for key, value in self.rows()[0].items():
            if key != "advice":
                table.add_row(key.replace("_", " "), f"{value:,.6g}" if isinstance(value, float) else str(value))
        told = [
            Text.assemble((f"{signature['name'].capitalize()}. ", "bold yellow"), signature["says"])
            for signature in self.facts.get("signatures", ())
        ]
        return Group(table, *told) if told else table

    def _save_pretrained(self, save_directory: Path) -> None:
        """Both files whole or not at all; the weights first, because a folder without config is no tokenizer yet."""
        state = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        atomic_save(save_directory / _WEIGHTS, lambda file: safetensors.torch.save_file(state, file))
        atomic_write(save_directory / _CONFIG, json.dumps(self.config, indent=1))

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options: Any) -> "Tokenizer":
        """Read both files from a folder or the hub, and build the kind that the config names."""
        if Path(model_id).is_dir():
            folder = Path(model_id)
            files = {name: folder / name for name in (_CONFIG, _WEIGHTS)}
        else:
            wanted = ("revision", "cache_dir", "force_download", "local_files_only", "token")
            where = {key: options[key] for key in wanted if key in options}
            files = {name: Path(hf_hub_download(model_id, name, **where)) for name in (_CONFIG, _WEIGHTS)}
        return _read(files[_CONFIG], files[_WEIGHTS], model_id)


def load_tokenizer(tokenizer: str | Path | Tokenizer) -> Tokenizer:
    """A tokenizer from its folder, or from the hub as `hf:owner/name`; one already made is returned as it is.

    Raises
    ------
    InputError
        There is no such folder (the nearest is named), it holds no tokenizer, or its files are damaged.
    """
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    name = str(tokenizer)
    if name.startswith("hf:"):
        try:
            loaded: Tokenizer = Tokenizer.from_pretrained(name.removeprefix("hf:").removeprefix("//"))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"The tokenizer {name} could not be had from the hub: {reason}") from error
        return loaded
    folder = Path(name)
    if not folder.is_dir():
        beside = [str(folder.parent / p.parent.name) for p in folder.parent.glob(f"*/{_CONFIG}")] if name else []
        what = "is a file, not a folder" if folder.exists() else "is not there"
        raise InputError(
            f"The tokenizer {name} {what}. Give the --out folder of `clustermim tokenizer fit`, or hf:owner/name."
            f"{nearest(name, beside)}"
        )
    return _read(folder / _CONFIG, folder / _WEIGHTS, name)


def _read(config_file: Path, weights_file: Path, name: str) -> Tokenizer:
    for file in (config_file, weights_file):
        if not file.is_file():
            raise InputError(
                f"{name} is no tokenizer: it holds no {file.name}. Give the --out folder of a finished "
                "`clustermim tokenizer fit`."
            )
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
        state = safetensors.torch.load_file(weights_file)
    except (ValueError, SafetensorError, OSError) as error:
        raise InputError(f"The tokenizer {name} is damaged ({error}). Fit it again.") from error
    kind = config.get("kind") if isinstance(config, Mapping) else None
    if kind not in KINDS:
        raise InputError(f"{config_file} describes no tokenizer: its kind is {kind!r}.{nearest(str(kind), KINDS)}")
    try:
        made = class_of(kind)(config)
        made.load_state_dict(state)
    except (RuntimeError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"The tokenizer {name} is damaged: its files do not fit each other ({reason}).") from error
    return made


def class_of(kind: str) -> type[Tokenizer]:
    """The class of a kind.

    Raises
    ------
    InputError
        There is no such kind; the nearest is named.
    """
    if kind not in KINDS:
        raise InputError(f"There is no tokenizer kind {kind!r}.{nearest(kind, KINDS)}")
    module, _, attribute = KINDS[kind].partition(":")
    found: type[Tokenizer] = getattr(importlib.import_module(module), attribute)
    return found
