"""The bottleneck: vectors of code space become codes, in two ways that share one rule at encoding: the nearest code.

`EMAQuantiser`: hard codes, gradients passed straight through, the codebook as running means of what it is assigned
(van den Oord et al., "Neural discrete representation learning", 2017, appendix A.1; Razavi et al., VQ-VAE-2, 2019).
`GumbelQuantiser`: a relaxed draw from a categorical distribution over codes (Jang et al. 2017; Maddison et al. 2017),
as in the dVAE of Ramesh et al. 2021, with logits −|z − e|²·s: so there too the most probable code is the nearest.

Everything that crosses processes is summed in whole numbers: the same bits whatever the number of processes.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Float, Int64
from torch import Tensor, nn

from clustermim.data.counted import Stream, counter_hash, uniform
from clustermim.tokenizers.assigning import Assigner

_FIXED_POINT = 2.0**32  # steps to one unit of code space in whole-number sums, finer than float32 near 1
_SMOOTHING = 1e-5  # Laplace, so that an unused code divides by no zero
_NOISE_IMAGES = 4  # images whose noise is drawn at once on a CPU: their hashes stay in cache


@dataclass(frozen=True)
class Quantised:
    """What the decoder sees, what each patch is called, and the price."""

    codes: Float[Tensor, "n d"]
    """Vectors for the decoder, through which gradients reach the encoder."""
    ids: Int64[Tensor, " n"]
    """The nearest code of each row."""
    penalty: Float[Tensor, ""]
    """To add to the loss."""
    figures: dict[str, Tensor]
    """Scalars for the log."""


class Quantiser(nn.Module, ABC):
    """Rows of code space (n, D) to codes; counts which codes are used.

    Parameters
    ----------
    size, dim
        K codes of D numbers.
    seed
        Of whatever is random.
    """

    codes: Tensor
    usage: Tensor

    def __init__(self, size: int, dim: int, *, seed: int) -> None:
        super().__init__()
        self.size, self.dim, self.seed = size, dim, seed
        self.register_buffer("usage", torch.zeros(size, dtype=torch.int64))

    @abstractmethod
    def start(self, codes: Float[Tensor, "k d"], spread: float, rows: int) -> None:
        """Take the first codes.

        Parameters
        ----------
        codes
            (K, D), from K-means on encoder outputs.
        spread
            Mean squared distance of a row to its code.
        rows
            Rows of one step over all processes.
        """

    @abstractmethod
    def forward(self, z: Float[Tensor, "n d"], index: Int64[Tensor, " b"], step: int, temperature: float) -> Quantised:
        """Quantise the rows of one training step.

        Parameters
        ----------
        z
            (n, D) encoder outputs, n / B rows of each image in turn.
        index
            (B,) place of each image in its source.
        step
            Number of the step: with the seed and the place it decides everything random.
        temperature
            Of the relaxed draw, above 0.
        """

    @abstractmethod
    def free(self, z: Float[Tensor, "n d"]) -> Quantised:
        """Let the rows pass as they are, at no price: for the steps before there are codes."""

    @torch.no_grad()
    def nearest(self, z: Float[Tensor, "n d"]) -> Int64[Tensor, " n"]:
        """The id of the nearest code of each row."""
        # The codes change each step, so the stopwatch would run anew each time; codes that overflowed are left to the
        # check of the weights.
        return Assigner(self.codes.detach().nan_to_num(), products="float32")(z.detach().float())

    @torch.no_grad()
    def count(self, found: Int64[Tensor, " k"]) -> None:
        """Note how often codes were used, over all processes."""
        self.usage += found

    def perplexity_and_used(self) -> tuple[float, int]:
        """Exp of the entropy of the codes noted since the last `forget_usage`, and how many of them occurred."""
        share = self.usage[self.usage > 0].double().cpu()
        if not len(share):
            return 0.0, 0
        share = share / share.sum()
        return float(torch.exp(-(share * share.log()).sum())), len(share)

    def forget_usage(self) -> None:
        """Begin to count anew."""
        self.usage.zero_()


class EMAQuantiser(Quantiser):
    """Straight-through codes that are exponential moving averages of the rows assigned to them.

    Parameters
    ----------
    size, dim, seed
        As for `Quantiser`.
    decay
        γ: a code keeps this share of itself at each step.
    commitment
        β: weight of |z − sg(e)|², which keeps the encoder near its codes.
    restart_below
        A code whose running use falls under this share of an even use is dead: it is put on a random row of the step.
    """

    running_counts: Tensor
    running_sums: Tensor

    def __init__(
        self, size: int, dim: int, *, seed: int, decay: float, commitment: float, restart_below: float
    ) -> None:
        super().__init__(size, dim, seed=seed)
        self.decay, self.commitment, self.restart_below = decay, commitment, restart_below
        self.register_buffer("codes", torch.zeros(size, dim))
        self.register_buffer("running_counts", torch.zeros(size))
        self.register_buffer("running_sums", torch.zeros(size, dim))

    @torch.no_grad()
    def start(self, codes: Float[Tensor, "k d"], spread: float, rows: int) -> None:
        """See `Quantiser.start`; each code begins with an even share of the use."""
        self.codes.copy_(codes)
        self.running_counts.fill_(rows / self.size)
        self.running_sums.copy_(codes * (rows / self.size))

    def forward(self, z: Float[Tensor, "n d"], index: Int64[Tensor, " b"], step: int, temperature: float) -> Quantised:
        """See `Quantiser.forward`; the codes used are those from before the step's update."""
        ids = self.nearest(z)
        chosen = self.codes[ids]
        commitment = (z - chosen).square().mean()
        through = z + (chosen - z).detach()  # e in value, z in gradient
        figures = {"commitment": commitment.detach()}
        if self.training:
            figures["restarted"] = self._update(z.detach(), ids, step)
        return Quantised(through, ids, self.commitment * commitment, figures)

    def free(self, z: Float[Tensor, "n d"]) -> Quantised:
        """See `Quantiser.free`."""
        nothing = z.new_zeros(())
        figures = {"commitment": nothing, "restarted": nothing}
        return Quantised(z, torch.zeros(len(z), dtype=torch.int64, device=z.device), nothing, figures)

    @torch.no_grad()
    def _update(self, z: Float[Tensor, "n d"], ids: Int64[Tensor, " n"], step: int) -> Float[Tensor, ""]:
        """One step of the moving averages, then new places for dead codes; returns how many were dead."""
        counts = torch.bincount(ids, minlength=self.size)
        sums = torch.zeros(self.size, self.dim, dtype=torch.int64, device=z.device)
        sums.index_add_(0, ids, (z.float() * _FIXED_POINT).round().long())
        counts, sums = _summed(counts), _summed(sums)
        self.count(counts)
        self.running_counts.lerp_(counts.float(), 1.0 - self.decay)
        self.running_sums.lerp_(sums.float() / _FIXED_POINT, 1.0 - self.decay)
        total = self.running_counts.sum()
        even = total / self.size
        dead = self.running_counts < self.restart_below * even
        # Without a look at `dead`, which would make the host wait for the device: a candidate for every code.
        fresh = self._random_rows(z, step)
        self.running_counts.copy_(torch.where(dead, even, self.running_counts))
        self.running_sums.copy_(torch.where(dead[:, None], fresh * even, self.running_sums))
        total = self.running_counts.sum()
        smoothed = (self.running_counts + _SMOOTHING) / (total + self.size * _SMOOTHING) * total
        self.codes.copy_(self.running_sums / smoothed[:, None])
        return dead.sum().float()

    def _random_rows(self, z: Float[Tensor, "n d"], step: int) -> Float[Tensor, "k d"]:
        """K rows drawn from those of all processes; the owner of a row brings it, the others add zeros."""
        world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        slots = torch.arange(self.size, device=z.device)
        picks = (uniform(self.seed, Stream.RESTART, step, slots).double() * (len(z) * world)).long()
        own = picks - rank * len(z)
        mine = (own >= 0) & (own < len(z))
        rows = torch.where(mine[:, None], z.float()[own.clamp(0, len(z) - 1)], 0.0)
        return _summed(rows)


class GumbelQuantiser(Quantiser):
    """Mixtures of codes by a Gumbel-softmax draw, whose temperature falls until they are nearly single codes.

    Parameters
    ----------
    size, dim, seed
        As for `Quantiser`.
    kl_weight
        Weight of the divergence of a patch's distribution over codes from the even one (Ramesh et al. 2021, the prior
        term), in nats a patch: it keeps codes in use.
    """

    log_scale: Tensor

    def __init__(self, size: int, dim: int, *, seed: int, kl_weight: float) -> None:
        super().__init__(size, dim, seed=seed)
        self.kl_weight = kl_weight
        self.codes = nn.Parameter(torch.zeros(size, dim))
        self.log_scale = nn.Parameter(torch.zeros(()))

    @torch.no_grad()
    def start(self, codes: Float[Tensor, "k d"], spread: float, rows: int) -> None:
        """See `Quantiser.start`; the logits begin as those of Gaussians as wide as the clusters."""
        self.codes.copy_(codes)
        self.log_scale.fill_(-math.log(2.0 * max(spread, 1e-12) / self.dim))

    def forward(self, z: Float[Tensor, "n d"], index: Int64[Tensor, " b"], step: int, temperature: float) -> Quantised:
        """See `Quantiser.forward`; outside training the nearest code is taken, unmixed."""
        e = self.codes
        # −|z − e|² up to |z|², which softmax does not see.
        logits = (2.0 * z.float() @ e.t() - e.square().sum(1)) * self.log_scale.exp()
        ids = self.nearest(z)
        log_q = logits.log_softmax(1)
        kl = (log_q.exp() * (log_q + math.log(self.size))).sum(1).mean()
        if self.training:
            mixed = ((logits + self._gumbel(logits, index, step)) / temperature).softmax(1) @ e
            self.count(_summed(torch.bincount(ids, minlength=self.size)))
        else:
            mixed = e[ids]
        return Quantised(mixed, ids, self.kl_weight * kl, {"kl": kl.detach()})

    def free(self, z: Float[Tensor, "n d"]) -> Quantised:
        """See `Quantiser.free`; the price is 0 but reaches every parameter, as several processes need it."""
        nothing = 0.0 * (self.codes.sum() + self.log_scale)
        ids = torch.zeros(len(z), dtype=torch.int64, device=z.device)
        return Quantised(z, ids, nothing, {"kl": nothing.detach()})

    @torch.no_grad()
    def _gumbel(self, like: Float[Tensor, "n k"], index: Int64[Tensor, " b"], step: int) -> Float[Tensor, "n k"]:
        """−log(−log u), u a hash of (seed, step, image, patch and code)."""
        patches = len(like) // max(len(index), 1)
        cell = torch.arange(patches * self.size, device=like.device)
        at_once = _NOISE_IMAGES if like.device.type == "cpu" else len(index)
        parts = []
        for some in torch.split(index.to(like.device), max(at_once, 1)):
            bits = counter_hash(self.seed, Stream.NOISE, step, some[:, None], cell)
            # 23 bits and a half step: exact in float32, so that neither 0 nor 1 can come out.
            u = ((bits >> 41) & ((1 << 23) - 1)).float().add_(0.5).mul_(1.0 / (1 << 23))
            parts.append(u.log_().neg_().log_().neg_())
        return torch.cat(parts).view_as(like)


def _summed(values: Tensor) -> Tensor:
    """The sum over all processes; with a single one, the values."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        values = values.contiguous()
        dist.all_reduce(values)
    return values
