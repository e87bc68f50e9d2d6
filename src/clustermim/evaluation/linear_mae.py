"""`linear-mae`: the linear probe as it is done for MAE: batch norm without affine and a linear layer, LARS, 90 epochs.

The protocol of He et al., "Masked autoencoders are scalable vision learners", CVPR 2022, appendix A.1 and table 10:
LARS, base learning rate 0.1 (for 256 images a step), no weight decay, momentum 0.9, 90 epochs, 10 of them warm-up,
cosine, random crops and flips. The batch is 16,384 images there; here it is an eighth of the training images where
these are fewer, and the learning rate goes with it.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from clustermim.errors import NonFiniteLossError
from clustermim.evaluation.cache import join
from clustermim.evaluation.judging import Figures, Scores
from clustermim.evaluation.online import Course

EPOCHS, WARMUP = 90, 10
BASE_LR = 0.1
BATCH = 16_384
_FEW_TURNS = 200.0
"""Sum of the learning rates over all steps below which LARS, which moves weights in proportion, hardly moves them."""


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rates: the step of a matrix is scaled to a share of its own norm.

    You, Gitman and Ginsburg, "Large batch training of convolutional networks", 2017, with momentum over the scaled
    gradients; vectors (biases) take the plain step and no weight decay.

    Parameters
    ----------
    parameters
        What to train.
    lr
        Learning rate.
    momentum
        Of the scaled gradients.
    weight_decay
        Added to the gradient of matrices.
    trust
        Share of its own norm that a matrix moves by at learning rate 1.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float = 0.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 0.001,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step; a closure is not supported."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                update = parameter.grad
                if parameter.ndim > 1:
                    update = update + group["weight_decay"] * parameter
                    own, size = parameter.norm(), update.norm()
                    scaled = group["trust"] * own / size
                    update = update * torch.where((own > 0) & (size > 0), scaled, torch.ones_like(own))
                state = self.state[parameter]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].mul_(group["momentum"]).add_(update)
                parameter.add_(state["momentum"], alpha=-group["lr"])


def learning_rate(epoch: float, epochs: float, warmup: float, peak: float) -> float:
    """A line from 0 to `peak` over `warmup` epochs, then half a cosine to 0; `epoch` counts steps as fractions."""
    if epoch < warmup:
        return peak * epoch / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))


class Head(nn.Module):
    """Batch norm without affine (eps 1e-6) and a linear layer, whose weights start small (normal, 0.01)."""

    def __init__(self, dim: int, num_classes: int, seed: int = 0) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(dim, affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, num_classes)
        with torch.no_grad():
            self.linear.weight.normal_(0, 0.01, generator=torch.Generator().manual_seed(seed))
            self.linear.bias.zero_()

    def forward(self, features: Float[Tensor, "b d"]) -> Float[Tensor, "b l"]:
        """Logits."""
        return self.linear(self.norm(features))  # type: ignore[no-any-return]


class HeadJudge:
    """A trained head; its batch norm applies the statistics gathered in training."""

    def __init__(self, head: nn.Module, chosen: Figures) -> None:
        self.head, self.chosen = head.eval(), chosen

    def answer(self, features: Float[Tensor, "m d"]) -> Scores:
        """Logits of each row."""
        with torch.inference_mode():
            return Scores(self.head(features))


def fit_linear_mae(course: Course) -> dict[tuple[int, str], HeadJudge]:
    """Train a head on every layer and pool, all on the same views, each view being encoded once.

    Parameters
    ----------
    course
        Encoder and training images. All of them are trained on: nothing is chosen.

    Returns
    -------
    dict
        (layer, pool) -> judge. `chosen` holds epochs, batch and peak learning rate, and a `note` where there are so few
        images that LARS hardly moves the weights in so many epochs.

    Raises
    ------
    NonFiniteLossError
        A loss became NaN or infinite.
    """
    epochs = course.epochs or EPOCHS
    loader = course.loader(train=True, batch_size=course.chunk)
    world = loader.world_size
    # As many of the encoder's batches as make up one of the head's.
    parts = max(1, min(BATCH, len(course.train) // 8) // (course.chunk * world))
    steps = max(1, len(loader) // parts)
    batch = parts * course.chunk * world
    peak = BASE_LR * batch / 256
    heads: dict[tuple[int, str], tuple[Head, LARS]] = {}
    rates = 0.0
    for epoch in range(epochs):
        held: dict[tuple[int, str], list[Tensor]] = {}
        targets: list[Tensor] = []
        step = 0
        for outputs, labels, _ in course.outputs(loader, epoch):
            for layer, output in outputs.items():
                for pool, block in output.pooled(course.encoder.global_name).items():
                    held.setdefault((layer, pool), []).append(block.float())
            targets.append(labels)
            if len(targets) < parts:
                continue
            y = join(torch.cat(targets), course.fabric).to(course.device)
            lr = learning_rate(epoch + step / steps, epochs, WARMUP * epochs / EPOCHS, peak)
            for key, blocks in held.items():
                x = join(torch.cat(blocks), course.fabric).to(course.device)
                if key not in heads:
                    made = Head(x.shape[1], course.num_classes, course.seed).to(course.device)
                    heads[key] = made, LARS(made.parameters())
                loss = train_step(*heads[key], x, y, lr)
            rates, step, held, targets = rates + lr, step + 1, {}, []
            if step == steps:
                break
        if not bool(loss.isfinite()):
            raise NonFiniteLossError(f"linear-mae on {course.encoder.name}: the loss of epoch {epoch + 1} is {loss}.")
        course.progress(f"linear-mae on {course.encoder.name}", epoch + 1, epochs)
    chosen: Figures = {"epochs": epochs, "batch": batch, "lr": peak}
    if rates < _FEW_TURNS:
        chosen["note"] = (
            f"{len(course.train):,} images are few for this protocol, which was made for 1.28 million: in {epochs} "
            f"epochs LARS moves the weights little; `linear` fits them to their optimum"
        )
    return {key: HeadJudge(head, dict(chosen)) for key, (head, _) in heads.items()}


def train_step(head: nn.Module, optimiser: LARS, x: Float[Tensor, "b d"], y: Tensor, lr: float) -> Float[Tensor, ""]:
    """One update of a head on features that are already made; gives the loss before it."""
    for group in optimiser.param_groups:
        group["lr"] = lr
    head.train()
    loss = nn.functional.cross_entropy(head(x), y)
    optimiser.zero_grad()
    torch.autograd.backward(loss)
    optimiser.step()
    return loss.detach()
