"""Counted randomness: every random number is a hash of (seed, stream, epoch, index, ...), never a step of a stream.

So the crop, the flip and the mask of an image do not depend on the world size, the number of workers, how an epoch is
cut into batches, or where a resumed run starts, and no loader state has to be saved.

The hash is the finaliser of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
OOPSLA 2014), applied once for each counter, in wrapping 64-bit integers: the same bits on a CPU and on a GPU.
"""

from enum import IntEnum

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15  # odd, so counter -> counter * _GOLDEN is one-to-one
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB
_WORD = (1 << 64) - 1


class Stream(IntEnum):
    """What a random number is for; passed as the first counter, so that no two purposes share numbers."""

    ORDER = 1
    CROP = 2
    FLIP = 3
    MASK = 4
    BLOCK = 5
    SPLIT = 6
    LIMIT = 7
    SAMPLE = 8
    INIT = 9
    TOKENS = 10
    NOISE = 11
    RESTART = 12
    PART = 20
    WINDOW = 21


def _signed(word: int) -> int:
    """An unsigned 64-bit word as the int64 of the same bits."""
    return word - (1 << 64) if word >= (1 << 63) else word


def _mix_int(word: int) -> int:
    word &= _WORD
    word = ((word ^ (word >> 30)) * _FIRST) & _WORD
    word = ((word ^ (word >> 27)) * _SECOND) & _WORD
    return word ^ (word >> 31)


def _mix_tensor(word: Int64[Tensor, "..."]) -> Int64[Tensor, "..."]:
    # int64 shifts copy the sign bit, so the copies are masked off to shift in zeros.
    word = (word ^ ((word >> 30) & ((1 << 34) - 1))) * _signed(_FIRST)
    word = (word ^ ((word >> 27) & ((1 << 37) - 1))) * _signed(_SECOND)
    return word ^ ((word >> 31) & ((1 << 33) - 1))


def counter_hash(seed: int, *counters: Int64[Tensor, "..."] | int) -> Int64[Tensor, "..."]:
    """64 well-mixed bits for each combination of counters.

    For fixed earlier counters the hash is one-to-one in the last counter, so sorting by it never meets a tie.

    Parameters
    ----------
    seed
        Any integer; taken modulo 2^64.
    counters
        Integers or int64 tensors that broadcast against each other, usually a `Stream`, the epoch and the image index.

    Returns
    -------
    Tensor
        int64 of the broadcast shape, on the device of the tensors; a scalar when all counters are integers.
    """
    state: Tensor | int = _mix_int(seed + _GOLDEN)
    for counter in counters:
        if isinstance(state, int) and isinstance(counter, int):
            state = _mix_int(state + int(counter) * _GOLDEN)
            continue
        if isinstance(counter, int):
            step: Tensor | int = _signed(int(counter) * _GOLDEN & _WORD)
        else:
            step = counter * _signed(_GOLDEN)
        summed = (_signed(state) if isinstance(state, int) else state) + step
        assert isinstance(summed, Tensor)
        state = _mix_tensor(summed)
    return torch.tensor(_signed(state), dtype=torch.int64) if isinstance(state, int) else state


def uniform(seed: int, *counters: Int64[Tensor, "..."] | int) -> Float32[Tensor, "..."]:
    """Uniform float32 in [0, 1) from the upper 24 bits of `counter_hash`, exactly representable on every device."""
    bits = (counter_hash(seed, *counters) >> 40) & ((1 << 24) - 1)
    return bits.to(torch.float32) * (1.0 / (1 << 24))


def permutation(
    seed: int, epoch: int, n: int, *, stream: Stream = Stream.ORDER, device: str | torch.device = "cpu"
) -> Int64[Tensor, "{n}"]:
    """A random order of 0..n-1 that depends only on (seed, stream, epoch, n)."""
    keys = counter_hash(seed, stream, epoch, torch.arange(n, device=device))
    return keys.argsort(stable=True)
