"""Attentive probe: a learned query attends to all tokens of a frozen encoder, a linear layer reads what it gathered.

Masked models spread what they know over the patches, so that pooling them by a mean undersells them (Chen et al.,
"Context autoencoder", 2022; El-Nouby et al., "Scalable pre-training of large autoregressive image models", 2024).
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from timm.layers.attention_pool import AttentionPoolLatent
from torch import Tensor, nn

from clustermim.encoders.contract import EncoderOutput
from clustermim.errors import NonFiniteLossError
from clustermim.evaluation.cache import join
from clustermim.evaluation.judging import Figures, Scores
from clustermim.evaluation.online import Course
from clustermim.training.optimiser import cosine_with_warmup, make_adamw, set_learning_rate

EPOCHS = 30
LEARNING_RATES = (3e-4, 1e-3, 3e-3)
POOL = "attention"


class AttentiveHead(nn.Module):
    """Layer norm without affine, attention of one learned query, linear layer."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        heads = next(h for h in (12, 8, 6, 4, 3, 2, 1) if dim % h == 0 and (dim // h >= 16 or h == 1))
        self.pool = AttentionPoolLatent(dim, num_heads=heads, mlp_ratio=0.0 if dim < 2 else 4.0)
        self.linear = nn.Linear(dim, num_classes)

    def forward(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b l"]:
        """Logits."""
        return self.linear(self.pool(self.norm(tokens)))  # type: ignore[no-any-return]


def tokens_of(output: EncoderOutput) -> Float[Tensor, "b n d"]:
    """All tokens of a batch: the class token, where it is as wide as the patches, and the patches."""
    if output.patches is None:
        assert output.cls is not None
        return output.cls[:, None].float()
    if output.cls is None or output.cls.shape[-1] != output.patches.shape[-1]:
        return output.patches.float()
    return torch.cat([output.cls[:, None], output.patches], dim=1).float()


class AttentiveJudge:
    """A trained head; it answers from the tokens of the test images, batch by batch."""

    def __init__(self, head: AttentiveHead, chosen: Figures) -> None:
        self.head, self.chosen = head.eval(), chosen

    def see(self, output: EncoderOutput) -> Float[Tensor, "b l"]:
        """Logits of a batch."""
        with torch.inference_mode():
            return self.head(tokens_of(output))  # type: ignore[no-any-return]

    def answer(self, seen: Float[Tensor, "m l"]) -> Scores:
        """The logits of all batches."""
        return Scores(seen)


def fit_attentive(course: Course) -> Mapping[tuple[int, str], AttentiveJudge]:
    """Train heads at three learning rates side by side on four fifths of train; the other fifth chooses one of them.

    The chosen head is not trained again on all of train.

    Parameters
    ----------
    course
        Encoder and training images.

    Returns
    -------
    dict
        (layer, "attention") -> judge; `chosen` holds `lr`, `val_top1` and `epochs`.

    Raises
    ------
    NonFiniteLossError
        No head of a layer was left with a finite loss.
    """
    epochs = course.epochs or EPOCHS
    loader = course.loader(train=True, batch_size=course.chunk)
    total = epochs * len(loader)
    validation = course.validation.to(course.device)
    heads: dict[tuple[int, float], AttentiveHead] = {}
    optimisers: dict[tuple[int, float], torch.optim.AdamW] = {}
    step = 0
    for epoch in range(epochs):
        for outputs, labels, index in course.outputs(loader, epoch):
            keep = ~validation[index]
            for layer, output in outputs.items():
                tokens = tokens_of(output)
                for peak in LEARNING_RATES:
                    key = (layer, peak)
                    if key not in heads:
                        heads[key] = _make_head(tokens.shape[-1], course)
                        optimisers[key] = make_adamw(heads[key], lr=peak, betas=(0.9, 0.999))
                    set_learning_rate(optimisers[key].param_groups, cosine_with_warmup(step, total, total // 10, peak))
                    loss = nn.functional.cross_entropy(heads[key](tokens[keep]), labels[keep], reduction="sum")
                    optimisers[key].zero_grad()
                    torch.autograd.backward(loss / max(1, int(keep.sum())))
                    _average_gradients(heads[key], course)
                    optimisers[key].step()
            step += 1
        course.progress(f"attentive probe on {course.encoder.name}", epoch + 1, epochs)
    return _choose(heads, course, epochs)


def _make_head(dim: int, course: Course) -> AttentiveHead:
    """Equal weights for every learning rate, from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(course.seed)
        head = AttentiveHead(dim, course.num_classes)
    return head.to(course.device).train()


def _average_gradients(head: nn.Module, course: Course) -> None:
    """The mean over processes, each of which has seen its part of the batch."""
    if course.fabric is not None and course.fabric.world_size > 1:
        for parameter in head.parameters():
            mean: Any = course.fabric.all_reduce(parameter.grad, reduce_op="mean")  # type: ignore[arg-type]
            parameter.grad = mean


def _choose(
    heads: dict[tuple[int, float], AttentiveHead], course: Course, epochs: int
) -> dict[tuple[int, str], AttentiveJudge]:
    right: dict[tuple[int, float], list[Tensor]] = {key: [] for key in heads}
    for head in heads.values():
        head.eval()
    for outputs, labels, index in course.outputs(course.loader(train=False)):
        keep = course.validation.to(course.device)[index]
        for (layer, peak), head in heads.items():
            with torch.inference_mode():
                logits = head(tokens_of(outputs[layer])[keep])
            right[layer, peak].append(torch.where(logits.isfinite().all(1), logits.argmax(1) == labels[keep], False))
    top1 = {key: join(torch.cat(found), course.fabric).double().mean().item() for key, found in right.items()}
    judges = {}
    for layer in course.which:
        best = max(LEARNING_RATES, key=lambda peak: top1[layer, peak])
        if not all(bool(p.isfinite().all()) for p in heads[layer, best].parameters()):
            raise NonFiniteLossError(f"Attentive probe on {course.encoder.name}, layer {layer}: every head diverged.")
        chosen: Figures = {"val_top1": top1[layer, best], "lr": best, "epochs": epochs}
        judges[layer, POOL] = AttentiveJudge(heads[layer, best], chosen)
    return judges
