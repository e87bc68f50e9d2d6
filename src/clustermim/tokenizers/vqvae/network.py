"""The two convolutional halves: an image to a vector for each patch, and such vectors back to pixels.

The patch side P is taken apart into primes, and each prime is the stride of one convolution, so any P from 1 on, odd or
even, gives exactly the (H/P × W/P) grid. Kernels reach a pixel beyond their stride on each side: neighbours are seen.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

_NARROWEST = 32  # channels of the first, finest stages, unless the whole network is narrower


def prime_factors(number: int) -> list[int]:
    """The primes whose product is `number`, ascending; none for 1."""
    found, prime = [], 2
    while number > 1:
        while number % prime == 0:
            found.append(prime)
            number //= prime
        prime += 1
    return found


def stage_widths(stages: int, width: int) -> list[int]:
    """Channels after each stage: `width` at the last, half as many at each finer one, down to a floor."""
    return [max(width >> (stages - 1 - stage), min(width, _NARROWEST)) for stage in range(stages)]


class ResidualBlock(nn.Module):
    """x + 1×1 ∘ ReLU ∘ 3×3 ∘ ReLU (x), half as wide inside (van den Oord et al. 2017, section 4.1)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = max(1, width // 2)
        self.spread = nn.Conv2d(width, inner, 3, padding=1)
        self.gather = nn.Conv2d(inner, width, 1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Of the same shape."""
        return x + self.gather(torch.relu(self.spread(torch.relu(x))))  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """Normalised images (B, C, H, W) to code space (B, D, H/P, W/P).

    Parameters
    ----------
    channels, patch_size
        Of the images.
    width
        Channels at the patch grid.
    depth
        Residual blocks at the patch grid; each lets a patch see one neighbour farther.
    code_dim
        D.
    """

    def __init__(self, *, channels: int, patch_size: int, width: int, depth: int, code_dim: int) -> None:
        super().__init__()
        strides = prime_factors(patch_size) or [1]
        layers: list[nn.Module] = []
        before = channels
        for stride, after in zip(strides, stage_widths(len(strides), width), strict=True):
            layers += [nn.Conv2d(before, after, stride + 2, stride=stride, padding=1), nn.ReLU()]
            before = after
        # No ReLU in front of the blocks: each begins with its own.
        self.layers = nn.Sequential(*layers[:-1], *(ResidualBlock(width) for _ in range(depth)), nn.ReLU())
        self.to_code = nn.Conv2d(width, code_dim, 1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d rows columns"]:
        """A vector for each patch."""
        return self.to_code(self.layers(x))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """Code space (B, D, H/P, W/P) back to normalised images (B, C, H, W): the encoder's stages in reverse."""

    def __init__(self, *, channels: int, patch_size: int, width: int, depth: int, code_dim: int) -> None:
        super().__init__()
        strides = prime_factors(patch_size)
        widths = [channels, *stage_widths(len(strides), width)]
        if not strides:
            strides, widths = [1], [channels, width]
        self.from_code = nn.Conv2d(code_dim, width, 3, padding=1)
        layers: list[nn.Module] = [ResidualBlock(width) for _ in range(depth)]
        for stage in reversed(range(len(strides))):
            stride = strides[stage]
            layers += [
                nn.ReLU(),
                nn.ConvTranspose2d(widths[stage + 1], widths[stage], stride + 2, stride=stride, padding=1),
            ]
        self.layers = nn.Sequential(*layers)

    def forward(self, z: Float[Tensor, "b d rows columns"]) -> Float[Tensor, "b c h w"]:
        """Pixels, normalised as the encoder's input was."""
        return self.layers(self.from_code(z))  # type: ignore[no-any-return]


@torch.no_grad()
def initialise(module: nn.Module, seed: int) -> None:
    """Draw all convolutions from `seed`: He-normal weights (He et al. 2015) by the inputs that an output sees."""
    generator = torch.Generator().manual_seed(seed)
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.ConvTranspose2d):
            taps = part.weight[0, 0].numel() / (part.stride[0] ** 2 if isinstance(part, nn.ConvTranspose2d) else 1)
            nn.init.normal_(part.weight, std=(2.0 / (part.in_channels * taps)) ** 0.5, generator=generator)
            assert part.bias is not None
            nn.init.zeros_(part.bias)
    for part in module.modules():
        if isinstance(part, ResidualBlock):
            part.gather.weight.mul_(0.1)  # a block begins near the identity
