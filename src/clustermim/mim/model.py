"""The model: an encoder that sees visible patches only, and a light decoder that predicts something of the hidden ones.

The asymmetric design is that of He et al. 2021 ("Masked Autoencoders Are Scalable Vision Learners"); what is predicted
(tokens, pixels) is the business of `targets.py`. The encoder is a plain timm `VisionTransformer`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from clustermim.encoders.keymaps import from_mae_layout, to_mae_layout
from clustermim.encoders.presets import decoder_defaults, model_kwargs, sincos_positions
from clustermim.encoders.weights import load_exactly
from clustermim.errors import InputError
from clustermim.features.patches import patchify


class MaskedImageModel(nn.Module):
    """Predicts the hidden patches of an image from its visible ones.

    Parameters
    ----------
    encoder
        A timm `VisionTransformer` with a class token and stored positions; its positions are fixed here.
    output_dim
        Numbers to predict for a patch: the vocabulary of a tokenizer, or the pixels of a patch.
    decoder_dim, decoder_depth, decoder_heads
        Width, blocks and attention heads of the decoder.
    mean, std
        Per-channel statistics that the model takes off the images, which it is given in [0,1].

    Raises
    ------
    InputError
        The encoder is of another kind, or a width is not divisible as attention and positions need it.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        output_dim: int,
        *,
        decoder_dim: int,
        decoder_depth: int,
        decoder_heads: int,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        if not isinstance(encoder, VisionTransformer) or encoder.cls_token is None or encoder.pos_embed is None:
            raise InputError(
                f"A {type(encoder).__name__} cannot be the encoder: a timm VisionTransformer with a class token and "
                "position embeddings is needed, such as the presets vit_micro to vit_l make."
            )
        if decoder_dim % decoder_heads or decoder_dim % 4:
            raise InputError(
                f"A decoder of width {decoder_dim} with {decoder_heads} heads cannot be built: the width must be "
                "divisible by the heads and by 4."
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
        self.decoder_embed = nn.Linear(encoder.embed_dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        self.decoder_pos_embed = nn.Parameter(sincos_positions(self.grid, decoder_dim), requires_grad=False)
        blocks = [Block(decoder_dim, decoder_heads, mlp_ratio=4.0, qkv_bias=True) for _ in range(decoder_depth)]
        self.decoder_blocks = nn.Sequential(*blocks)
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_dim, output_dim)
        # Not part of the weights: the state dict is exactly the MAE layout, and the manifest records mean and std.
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32), persistent=False)

    @property
    def num_patches(self) -> int:
        """N, the patches of an image."""
        return self.grid[0] * self.grid[1]

    def forward(
        self, images: Float[Tensor, "b c h w"], mask: Bool[Tensor, "b n"], hidden: int | None = None
    ) -> Float[Tensor, "b hidden out"]:
        """Predictions for the hidden patches of each image, in row-major order of their positions.

        Parameters
        ----------
        images
            In [0,1].
        mask
            True where a patch is hidden; the same number in every row.
        hidden
            That number, for callers that know it: finding it out makes the host wait for the device.
        """
        visible, hidden_at = split_mask(mask, hidden)
        return self.decode(self.encode(images, visible), visible, hidden_at)

    def encode(self, images: Float[Tensor, "b c h w"], visible: Int64[Tensor, "b v"]) -> Float[Tensor, "b tokens d"]:
        """The encoder's last layer after its norm for the class token and the patches `visible`: (B, 1+V, D).

        Only these patches are ever embedded. The patch projection is a convolution whose windows do not overlap, so it
        is done as a matrix product on the gathered pixels.
        """
        encoder = self.encoder
        pixels = take_rows(patchify(images, self.patch_size), visible)
        pixels = normalise(pixels, self.mean, self.std).view(*visible.shape, -1, self.channels)
        projection = encoder.patch_embed.proj
        # The pixels are brought into the order of the weight, not the weight into theirs, so that its gradient has its
        # layout.
        tokens = F.linear(pixels.transpose(2, 3).flatten(2), projection.weight.flatten(1), projection.bias)
        tokens = encoder.patch_embed.norm(tokens)
        class_token, positions = _class_token_and_positions(encoder)
        tokens = tokens + positions[1:][visible]
        first = (class_token + positions[:1]).expand(tokens.shape[0], -1, -1)
        tokens = torch.cat([first.to(tokens.dtype), tokens], dim=1)
        result: Tensor = encoder.norm(encoder.blocks(encoder.norm_pre(tokens)))
        return result

    def decode(
        self,
        encoded: Float[Tensor, "b tokens d"],
        visible: Int64[Tensor, "b v"],
        hidden: Int64[Tensor, "b hidden"],
    ) -> Float[Tensor, "b hidden out"]:
        """Predictions at the positions `hidden` from the encoder's output for the positions `visible`.

        Attention knows positions only by what is added to the tokens, so the mask tokens simply follow the visible ones
        and nothing is shuffled back; the last norm and the head run on the hidden patches alone.
        """
        positions = self.decoder_pos_embed[0]
        seen = self.decoder_embed(encoded)
        places = F.pad(visible + 1, (1, 0))  # 0 is the class token's
        seen = seen + positions[places]
        asked = self.mask_token + positions[1:][hidden]
        tokens = self.decoder_blocks(torch.cat([seen, asked.to(seen.dtype)], dim=1))
        result: Tensor = self.decoder_pred(self.decoder_norm(tokens[:, seen.shape[1] :]))
        return result

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


def build_model(
    model: str,
    *,
    image_size: int | tuple[int, int],
    patch_size: int,
    channels: int,
    output_dim: int,
    mean: Sequence[float],
    std: Sequence[float],
    seed: int = 0,
    decoder_dim: int | None = None,
    decoder_depth: int | None = None,
    decoder_heads: int | None = None,
) -> tuple[MaskedImageModel, dict[str, Any]]:
    """A `MaskedImageModel` by name, its weights drawn from `seed` alone.

    Parameters
    ----------
    model
        A preset or the name of a plain timm ViT.
    image_size, patch_size, channels
        Of the images and the patches, in pixels.
    output_dim
        Numbers to predict for a patch.
    mean, std
        Per channel.
    seed
        Of the weights; the global generator is neither read nor moved.
    decoder_dim, decoder_depth, decoder_heads
        Where None, those that go with `model`.

    Returns
    -------
    tuple[MaskedImageModel, dict]
        The model, and ``{"name", "kwargs"}`` from which ``timm.create_model`` alone rebuilds the encoder.

    Raises
    ------
    InputError
        Unknown model, a patch side that does not divide the image, a decoder that cannot be built.
    """
    name, kwargs = model_kwargs(model, image_size, patch_size, channels)
    defaults = decoder_defaults(model)
    with torch.random.fork_rng(devices=[]):
        encoder = timm.create_model(name, **kwargs, num_classes=0)
        built = MaskedImageModel(
            encoder,
            output_dim,
            decoder_dim=decoder_dim if decoder_dim is not None else defaults["dim"],
            decoder_depth=decoder_depth if decoder_depth is not None else defaults["depth"],
            decoder_heads=decoder_heads if decoder_heads is not None else defaults["heads"],
            mean=mean,
            std=std,
        )
    initialise(built, seed)
    return built, {"name": name, "kwargs": kwargs}


@torch.no_grad()
def initialise(model: MaskedImageModel, seed: int) -> None:
    """Draw all weights from `seed`: Xavier-uniform matrices (the patch projection as one matrix too), zero biases.

    Class token, mask token: normal, std 0.02. Positions: fixed sine-cosine. As in MAE.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.flatten(1), generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    class_token, positions = _class_token_and_positions(model.encoder)
    nn.init.normal_(class_token, std=0.02, generator=generator)
    nn.init.normal_(model.mask_token, std=0.02, generator=generator)
    positions.copy_(sincos_positions(model.grid, model.encoder.embed_dim)[0])


def _class_token_and_positions(encoder: VisionTransformer) -> tuple[Tensor, Tensor]:
    """(1, 1, D) and (1+N, D); that there are such was checked when the model was built."""
    assert encoder.cls_token is not None
    assert encoder.pos_embed is not None
    return encoder.cls_token, encoder.pos_embed[0]


def normalise(
    patches: Float[Tensor, "b n d"], mean: Float[Tensor, " c"], std: Float[Tensor, " c"]
) -> Float[Tensor, "b n d"]:
    """Take each channel's mean and standard deviation off patches whose channels come last, as `patchify` cuts them."""
    pixels = patches.reshape(*patches.shape[:2], -1, len(mean))
    return ((pixels - mean) / std).flatten(2)


def split_mask(
    mask: Bool[Tensor, "b n"], hidden: int | None = None
) -> tuple[Int64[Tensor, "b v"], Int64[Tensor, "b hidden"]]:
    """Where the visible and the hidden patches of each image are, each in row-major order.

    Parameters
    ----------
    mask
        True where a patch is hidden.
    hidden
        Hidden patches in each row. Where None, they are counted, and unequal rows are refused.

    Raises
    ------
    InputError
        The rows hide different numbers of patches.
    """
    if hidden is None:
        counts = mask.sum(dim=1)
        hidden = int(counts[0])
        if not bool((counts == hidden).all()):
            raise InputError("The mask hides different numbers of patches in different images; each must hide as many.")
    order = torch.sort(mask.to(torch.uint8), dim=1, stable=True).indices
    return order[:, : mask.shape[1] - hidden], order[:, mask.shape[1] - hidden :]


def take_rows(values: Float[Tensor, "b n d"], at: Int64[Tensor, "b k"]) -> Float[Tensor, "b k d"]:
    """The rows `at` of each image's table `values`: whole rows are copied, which beats an element-wise gather."""
    batch, length, width = values.shape
    start = torch.arange(batch, device=at.device)[:, None] * length
    return values.reshape(batch * length, width)[(at + start).flatten()].view(batch, at.shape[1], width)
