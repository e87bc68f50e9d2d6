"""Encoder, bottleneck and decoder as one thing to train: images in, a loss and its figures out."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from clustermim.tokenizers.vqvae.network import Decoder, Encoder, initialise
from clustermim.tokenizers.vqvae.quantiser import Quantised, Quantiser


class VQVAE(nn.Module):
    """An autoencoder with one discrete code for each patch.

    Parameters
    ----------
    quantiser
        The bottleneck; its D is the code space's.
    patch_size
        Patch side P.
    mean, std
        Statistics of each channel, by which images in [0, 1] are normalised.
    width, depth
        Of the encoder and the decoder.
    seed
        Of the weights.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        quantiser: Quantiser,
        *,
        patch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        width: int,
        depth: int,
        seed: int,
    ) -> None:
        super().__init__()
        sizes = {"channels": len(mean), "patch_size": patch_size, "width": width, "depth": depth}
        with torch.random.fork_rng(devices=[]):  # the layers' own first weights, overwritten below
            self.encoder = Encoder(**sizes, code_dim=quantiser.dim)
            self.decoder = Decoder(**sizes, code_dim=quantiser.dim)
        self.quantiser = quantiser
        self.register_buffer("mean", torch.tensor(list(mean)).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(list(std)).view(-1, 1, 1))
        initialise(self, seed)

    def encode(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d rows columns"]:
        """Code space of images in [0, 1]."""
        found: Tensor = self.encoder((images - self.mean) / self.std)
        return found

    def forward(
        self, images: Float[Tensor, "b c h w"], index: Int64[Tensor, " b"], step: int, temperature: float | None
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """The loss of a batch, and scalars for the log.

        Parameters
        ----------
        images
            (B, C, H, W) in [0, 1].
        index, step, temperature
            As for `Quantiser.forward`; without a temperature nothing is quantised.

        Returns
        -------
        loss
            Mean squared error of normalised pixels, plus the bottleneck's penalty.
        figures
            ``reconstruction_mse`` in squared units of [0, 1], and those of the bottleneck.
        """
        target = (images - self.mean) / self.std
        z = self.encoder(target)
        rows = z.permute(0, 2, 3, 1)
        with torch.autocast(images.device.type, enabled=False):  # near codes differ in digits that bfloat16 lacks
            flat = rows.reshape(-1, rows.shape[3]).float()
            found: Quantised = (
                self.quantiser.free(flat) if temperature is None else self.quantiser(flat, index, step, temperature)
            )
        error = self.decoder(found.codes.view(rows.shape).permute(0, 3, 1, 2)).float() - target
        loss = error.square().mean() + found.penalty
        with torch.no_grad():
            mse = (error * self.std).square().mean()
        return loss, {"reconstruction_mse": mse, **found.figures}
