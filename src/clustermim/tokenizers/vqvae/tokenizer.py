"""The trained autoencoder as a tokenizer: the nearest code to the encoder's output, and codes back to pictures."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from clustermim.errors import InputError
from clustermim.features.patches import PatchFeatures
from clustermim.tokenizers.codebook import Codebook
from clustermim.tokenizers.tokenizer import Tokenizer
from clustermim.tokenizers.vqvae.network import Decoder, Encoder

_SURROUNDINGS = 5  # patches a side of the even field whose middle shows a code


class CodeSpaceFeatures(PatchFeatures):
    """The encoder of a VQ-VAE as patch features: what its codes are nearest to.

    Parameters
    ----------
    patch_size, width, depth, code_dim
        As for `Encoder`.
    mean, std
        Statistics of each channel, by which pixels are normalised.
    encoder
        Trained; None to make an empty one, whose state is loaded afterwards.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        *,
        patch_size: int,
        width: int,
        depth: int,
        code_dim: int,
        mean: Sequence[float],
        std: Sequence[float],
        encoder: Encoder | None = None,
    ) -> None:
        super().__init__("vqvae", patch_size=patch_size, channels=len(mean), dim=code_dim)
        self.width, self.depth = width, depth
        if encoder is None:
            encoder = Encoder(channels=len(mean), patch_size=patch_size, width=width, depth=depth, code_dim=code_dim)
        self.encoder = encoder
        self.register_buffer("mean", torch.tensor(list(mean)).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(list(std)).view(-1, 1, 1))
        self.requires_grad_(False).eval()

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "CodeSpaceFeatures":
        """The inverse of `config`."""
        return cls(**{key: config[key] for key in ("patch_size", "width", "depth", "code_dim", "mean", "std")})

    def config(self) -> dict[str, Any]:
        """Everything `__init__` takes."""
        return {
            "name": "vqvae",
            "patch_size": self.patch_size,
            "width": self.width,
            "depth": self.depth,
            "code_dim": self.dim,
            "mean": self.mean.flatten().tolist(),
            "std": self.std.flatten().tolist(),
        }

    def describe(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """Encoder outputs, patches in row-major order."""
        found: Tensor = self.encoder((images.to(self.mean.dtype) - self.mean) / self.std)
        return found.flatten(2).transpose(1, 2)


class VQVAETokenizer(Tokenizer):
    """The id of the code nearest to a patch in the space of a learned encoder, and a decoder that shows what it means.

    Sources: van den Oord et al. 2017 (VQ-VAE); Ramesh et al. 2021 (dVAE, as BEiT uses it).

    Parameters
    ----------
    config
        Also holds ``features``, the config of the encoder.
    features, codebook, decoder
        The trained parts; None to make empty ones, whose state is loaded afterwards.
    """

    kind = "vqvae"
    features: CodeSpaceFeatures
    codebook: Codebook

    def __init__(
        self,
        config: dict[str, Any],
        features: CodeSpaceFeatures | None = None,
        codebook: Codebook | None = None,
        decoder: Decoder | None = None,
    ) -> None:
        super().__init__(config)
        with torch.random.fork_rng(devices=[]):  # first weights that are overwritten
            self.features = CodeSpaceFeatures.from_config(config["features"]) if features is None else features
            dim = self.features.dim
            self.codebook = Codebook(torch.zeros(self.vocab_size, dim)) if codebook is None else codebook
            self.decoder: nn.Module = (
                Decoder(
                    channels=self.channels,
                    patch_size=self.patch_size,
                    width=self.features.width,
                    depth=self.features.depth,
                    code_dim=dim,
                )
                if decoder is None
                else decoder
            )
        self.requires_grad_(False).eval()

    def tokens(
        self,
        images: Float[Tensor, "b c h w"],
        index: Int64[Tensor, " b"] | None,
        labels: Int64[Tensor, " b"] | None,
    ) -> Int64[Tensor, "b n"]:
        """Encode, then look up."""
        described = self.features(images)
        return self.codebook.assign(described.flatten(0, 1)).view(described.shape[:2])

    @torch.no_grad()
    def decode(self, ids: Int64[Tensor, "b n"], grid: tuple[int, int] | None = None) -> Float[Tensor, "b c h w"]:
        """Images of tokens.

        Parameters
        ----------
        ids
            (B, N) as `encode` gives them.
        grid
            Patches down and across; None takes those of the images it was made for.

        Returns
        -------
        Tensor
            (B, C, H, W) in [0, 1].

        Raises
        ------
        InputError
            The ids do not fill the grid, or are none of this vocabulary.
        """
        rows, columns = self.grid if grid is None else grid
        if ids.shape[1] != rows * columns:
            raise InputError(
                f"{ids.shape[1]} tokens an image do not fill a grid of {rows} × {columns} patches. Give decode(ids, "
                "grid=(rows, columns)) for images of another size than the tokenizer was made for."
            )
        if ids.numel() and not (int(ids.min()) >= 0 and int(ids.max()) < self.vocab_size):
            raise InputError(f"These ids are not all in [0, {self.vocab_size}): they are of another tokenizer.")
        with torch.autocast(ids.device.type, enabled=False):
            codes = self.codebook.centroids[ids].view(len(ids), rows, columns, -1).permute(0, 3, 1, 2)
            pixels: Tensor = self.decoder(codes) * self.features.std + self.features.mean
        return pixels.clamp(0.0, 1.0)

    @torch.no_grad()
    def code_pictures(self) -> Float[Tensor, "k c p p"]:
        """A picture of each code: the middle patch of a decoded field that holds nothing but this code."""
        side, p, middle = _SURROUNDINGS, self.patch_size, _SURROUNDINGS // 2 * self.patch_size
        pictures = []
        for ids in torch.split(torch.arange(self.vocab_size, device=self.codebook.centroids.device), 256):
            fields = self.decode(ids[:, None].expand(-1, side * side), grid=(side, side))
            pictures.append(fields[:, :, middle : middle + p, middle : middle + p].clone())
        return torch.cat(pictures)
