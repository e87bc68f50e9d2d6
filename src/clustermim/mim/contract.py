"""What every masked image model is: a timm encoder, and predictions for patches that it was not shown."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clustermim.encoders.keymaps import from_mae_layout, to_mae_layout
from clustermim.encoders.weights import load_exactly
from clustermim.errors import InputError
from clustermim.features.patches import patchify
from clustermim.mim.selecting import channel_table, normalise, split_mask, take_rows


class MaskedModel(nn.Module, ABC):
    """Base of all masked image models.

    Parameters
    ----------
    encoder
        A timm `VisionTransformer` with a class token and stored positions; its positions are fixed here.
    output_dim
        Numbers to predict for a patch: the vocabulary of a tokenizer, or the length of a description.
    mean, std
        Per-channel statistics that the model takes off the images, which it is given in [0,1].

    Raises
    ------
    InputError
        The encoder is of another kind, or the statistics are of other channels.
    """

    encoder: VisionTransformer
    mask_token: nn.Parameter
    mean: Tensor
    std: Tensor

    def __init__(self, encoder: nn.Module, output_dim: int, *, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if not isinstance(encoder, VisionTransformer) or encoder.cls_token is None or encoder.pos_embed is None:
            raise InputError(
                f"A {type(encoder).__name__} cannot be the encoder: a timm VisionTransformer with a class token and "
                "position embeddings is needed, such as the presets vit_micro to vit_l make."
            )
        self.patch_size = int(encoder.patch_embed.patch_size[0])
        self.channels = int(encoder.in_chans)
        if len(mean) != self.channels or len(std) != self.channels:
            raise InputError(
                f"mean and std have {len(mean)} and {len(std)} entries, but the encoder takes {self.channels} channels."
            )
        rows, columns = encoder.patch_embed.grid_size
        self.grid = (int(rows), int(columns))
        self.output_dim = output_dim
        encoder.pos_embed.requires_grad_(False)
        self.encoder = encoder
        # Not part of the weights: the state dict is exactly the MAE layout, and the manifest records mean and std.
        self.register_buffer("mean", channel_table(mean), persistent=False)
        self.register_buffer("std", channel_table(std), persistent=False)

    @property
    def num_patches(self) -> int:
        """N, the patches of an image."""
        return self.grid[0] * self.grid[1]

    def forward(
        self,
        images: Float[Tensor, "b c h w"],
        mask: Bool[Tensor, "b n"],
        hidden: int | None = None,
        asked: Bool[Tensor, "b n"] | None = None,
        count: int | None = None,
    ) -> Float[Tensor, "b asked out"]:
        """Predictions for the hidden patches of each image, in row-major order of their positions.

        Parameters
        ----------
        images
            In [0,1].
        mask
            True where a patch is hidden; the same number in every row.
        hidden
            That number, for callers that know it: finding it out makes the host wait for the device.
        asked
            True where a prediction is wanted, a part of the hidden patches and as many in every row; all where None.
        count
            That number.
        """
        visible, hidden_at = split_mask(mask, hidden)
        asked_at = hidden_at if asked is None else split_mask(asked, count)[1]
        return self.predict(images, visible, hidden_at, asked_at)

    @abstractmethod
    def predict(
        self,
        images: Float[Tensor, "b c h w"],
        visible: Int64[Tensor, "b v"],
        hidden: Int64[Tensor, "b hidden"],
        asked: Int64[Tensor, "b asked"],
    ) -> Float[Tensor, "b asked out"]:
        """Predictions at the positions `asked`, which are among `hidden`."""

    def embed(self, images: Float[Tensor, "b c h w"], at: Int64[Tensor, "b v"] | None = None) -> Float[Tensor, "b v d"]:
        """The patches `at` (all where None) as the encoder's tokens, without positions; no others are ever embedded.

        The patch projection is a convolution whose windows do not overlap, so it is done as a matrix product on the
        gathered pixels.
        """
        pixels = patchify(images, self.patch_size)
        if at is not None:
            pixels = take_rows(pixels, at)
        pixels = normalise(pixels, self.mean, self.std).view(*pixels.shape[:2], -1, self.channels)
        embedding = self.encoder.patch_embed
        # The pixels are brought into the order of the weight, not the weight into theirs, so that its gradient has its
        # layout.
        ordered = pixels.transpose(2, 3).flatten(2)
        tokens = F.linear(ordered, embedding.proj.weight.flatten(1), embedding.proj.bias)
        result: Tensor = embedding.norm(tokens)
        return result

    def through(self, blocks: Iterable[nn.Module], tokens: Float[Tensor, "b t d"], *context: Tensor | int) -> Tensor:
        """Tokens through blocks one after the other, each of them also given `context`.

        With activation checkpointing (`encoder.set_grad_checkpointing`, which counts for the decoder too) a block keeps
        its input only and is computed again for the gradient: Chen et al. 2016, "Training deep nets with sublinear
        memory cost".
        """
        again = bool(self.encoder.grad_checkpointing) and torch.is_grad_enabled()
        for block in blocks:
            if again:
                # Nothing in a block is random, so no generator has to be put back.
                tokens = checkpoint(block, tokens, *context, use_reentrant=False, preserve_rng_state=False)
            else:
                tokens = block(tokens, *context)
        return tokens

    def class_token_and_positions(self) -> tuple[Float[Tensor, "1 1 d"], Float[Tensor, "tokens d"]]:
        """The class token (1, 1, D), and the positions (1+N, D) of it and of the patches."""
        assert self.encoder.cls_token is not None  # checked when the model was built
        assert self.encoder.pos_embed is not None
        return self.encoder.cls_token, self.encoder.pos_embed[0]

    def mae_state(self) -> dict[str, Tensor]:
        """The weights under the keys of the MAE layout (`cls_token`, `blocks.*`, `decoder_blocks.*`, ...)."""
        return to_mae_layout(self.state_dict())

    def load_mae_state(self, state: Mapping[str, Tensor]) -> None:
        """Load weights that carry the keys of the MAE layout.

        Raises
        ------
        InputError
            A tensor is missing, left over or of another shape; the first is named.
        """
        load_exactly(self, from_mae_layout(state), "The MAE-layout state", "this model")
