"""The model of BEiT (Bao et al. 2022): the encoder itself sees mask tokens, and a linear head predicts."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from clustermim.mim.contract import MaskedModel
from clustermim.mim.selecting import take_rows


class FullEncoderModel(MaskedModel):
    """Predicts the hidden patches of an image by an encoder that sees all places, with a mask token at hidden ones.

    The encoder costs 1 / (1 − mask ratio) times that of `MaskedImageModel`; there is no decoder. The baseline BEiT is.

    Parameters
    ----------
    encoder, output_dim, mean, std
        As for `MaskedModel`.
    """

    def __init__(self, encoder: nn.Module, output_dim: int, *, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__(encoder, output_dim, mean=mean, std=std)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, self.encoder.embed_dim))
        self.decoder_pred = nn.Linear(self.encoder.embed_dim, output_dim)

    def predict(
        self,
        images: Float[Tensor, "b c h w"],
        visible: Int64[Tensor, "b v"],
        hidden: Int64[Tensor, "b hidden"],
        asked: Int64[Tensor, "b asked"],
    ) -> Float[Tensor, "b asked out"]:
        """Predictions at the positions `asked`; the head runs on these alone."""
        encoder = self.encoder
        class_token, positions = self.class_token_and_positions()
        seen = self.embed(images, visible) + positions[1:][visible]
        unseen = (self.mask_token + positions[1:][hidden]).to(seen.dtype)
        first = (class_token + positions[:1]).expand(len(seen), -1, -1).to(seen.dtype)
        # Attention knows positions only by what is added to the tokens: hidden places may follow the visible ones.
        encoded = encoder.norm(self.through(encoder.blocks, encoder.norm_pre(torch.cat([first, seen, unseen], dim=1))))
        predicted = encoded[:, 1 + visible.shape[1] :]
        if asked is not hidden:
            predicted = take_rows(predicted, torch.searchsorted(hidden.contiguous(), asked.contiguous()))
        result: Tensor = self.decoder_pred(predicted)
        return result
