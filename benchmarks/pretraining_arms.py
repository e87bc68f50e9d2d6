"""One way of training a masked autoencoder for `pretraining_speed.py`: a process that takes a step when told to.

    python benchmarks/pretraining_arms.py --arm pixel --precision bf16 [--compile] [--peers DIR]

All arms have ViT-S/16 at 224² and a decoder of width 256, 8 blocks and 8 heads, hide three quarters of the patches,
predict the hidden ones (pixels brought to mean 0 and variance 1 a patch, or tokens) and update with fused AdamW. The
peers are used as their documentation shows, under torch.autocast where bf16 is asked for; ours is what
`clustermim pretrain` runs. The arm `products` does nothing but the matrix products of our pixel step, in their order
and shapes: what is left when all else takes no time. A line `step` on standard input is one step, answered with its
seconds and loss; `end` is answered with the memory above that after the imports.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from memory import peak_above, start_peak

SIDE, PATCH, RATIO = 224, 16, 0.75
BATCH = int(os.environ.get("BATCH", "32"))
WIDTH, DEPTH, HEADS = 256, 8, 8
VOCABULARY = 50
PEERS = ("transformers", "lightly", "stable-pretraining")
LR, DECAY, BETAS = 1.5e-4, 0.05, (0.9, 0.95)

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_linear_pointwise")

Step = Callable[[], float]
"""One update of the weights; gives back the loss."""


def count(module: Any) -> int:
    """Parameters that are trained."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def pictures() -> Any:
    """(B, 3, H, W) in [0, 1], smooth with a grain: noise would give the tokenizer ties that no photo has."""
    import torch

    draw = torch.Generator().manual_seed(0)
    smooth = torch.nn.functional.interpolate(
        torch.rand(BATCH, 3, SIDE // PATCH, SIDE // PATCH, generator=draw), size=SIDE, mode="bicubic"
    )
    return (smooth + 0.05 * torch.randn(smooth.shape, generator=draw)).clamp_(0, 1)


def ours(
    target: str, decoder: str, predict: float, precision: str, compile: bool
) -> Callable[[], tuple[dict[str, int], Step]]:
    """Our model and step; `predict` is the share of the hidden patches that is predicted."""
    import torch

    from clustermim.data.loaders import Batch
    from clustermim.data.sources import open_source
    from clustermim.mim.building import build_model
    from clustermim.mim.pretraining import Masking, PretrainConfig, choose_kernels, compiled, masked_loss
    from clustermim.mim.targets import TargetOptions, make_target
    from clustermim.tokenizers.fitting import fit
    from clustermim.training.launch import make_fabric
    from clustermim.training.optimiser import make_adamw

    def make() -> tuple[dict[str, int], Step]:
        fabric = make_fabric("cpu", 1, "bf16-mixed" if precision == "bf16" else "32-true")
        mean, std = (0.5,) * 3, (0.25,) * 3
        images = pictures()
        tokenizer = None
        if target == "token":
            few = (images[:8].permute(0, 2, 3, 1) * 255).to(torch.uint8).numpy()
            tokenizer = fit(open_source(few), patch_size=PATCH, k=VOCABULARY)
        wanted = make_target(target, TargetOptions(patch_size=PATCH, mean=mean, std=std, tokenizer=tokenizer))
        model, _ = build_model(
            "vit_s", image_size=SIDE, patch_size=PATCH, channels=3, output_dim=wanted.output_dim, mean=mean, std=std,
            decoder=decoder, decoder_dim=WIDTH, decoder_depth=DEPTH, decoder_heads=HEADS,
        )  # fmt: skip
        config = PretrainConfig(
            epochs=1, batch_size=BATCH, base_lr=LR, mask_ratio=RATIO, predict_ratio=predict, compile=compile
        )
        masking = Masking(config, model.grid)
        choose_kernels(model, fabric)
        adamw: Any = make_adamw(model, lr=LR, weight_decay=DECAY, betas=BETAS)
        forward, optimiser = fabric.setup(compiled(model) if compile else model, adamw)
        fabric.to_device(wanted)
        taken = 0

        def step() -> float:
            nonlocal taken
            batch = Batch(images, torch.arange(BATCH) + BATCH * taken, None)
            loss, _ = masked_loss(forward, wanted, batch, masking, 0)
            fabric.backward(loss)
            optimiser.step()
            optimiser.zero_grad()
            taken += 1
            return float(loss)

        encoder = count(model.encoder)
        return {"encoder": encoder, "decoder": count(model) - encoder}, step

    return make


def plain(
    precision: str, compile: bool, build: Callable[[], tuple[Any, Any, Callable[[Any, Any], Any]]]
) -> tuple[dict[str, int], Step]:
    """The step of a peer: `build` gives model, encoder, and the loss as a function of model and normalised images."""
    import torch

    torch.manual_seed(0)
    model, encoder, loss_of = build()
    images = (pictures() - 0.5) / 0.25
    sizes = {"encoder": count(encoder), "decoder": count(model) - count(encoder)}
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=LR, weight_decay=DECAY, betas=BETAS, fused=True)
    forward = torch.compile(model) if compile else model

    def step() -> float:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            loss = loss_of(forward, images)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        return float(loss)

    return sizes, step


def products_arm(precision: str) -> Callable[[], tuple[dict[str, int], Step]]:
    """The matrix products that one of our steps makes, seen by the dispatcher, and made again on noise."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    made: list[tuple[Any, list[Any]]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket._qualified_op_name.split("::")[-1] in PRODUCTS:
                made.append((func, [outline(a) if isinstance(a, torch.Tensor) else a for a in args]))
            return func(*args, **(kwargs or {}))

    def outline(tensor: Any) -> tuple[Any, ...]:
        return (tuple(tensor.shape), tensor.stride(), tensor.dtype)

    def noise(shape: Any, stride: Any, dtype: Any) -> Any:
        return torch.empty_strided(shape, stride, dtype=dtype).normal_()

    def make() -> tuple[dict[str, int], Step]:
        sizes, whole = ours("pixel", "self", 1.0, precision, False)()
        with Watch():
            whole()
        stand_ins = {a: noise(*a) for _, arguments in made for a in arguments if isinstance(a, tuple)}
        calls = [(f, [stand_ins[a] if isinstance(a, tuple) else a for a in arguments]) for f, arguments in made]

        def step() -> float:
            with torch.no_grad():
                for func, arguments in calls:
                    func(*arguments)
            return 0.0

        return sizes, step

    return make


def transformers_arm(precision: str, compile: bool) -> Callable[[], tuple[dict[str, int], Step]]:
    """`transformers.ViTMAEForPreTraining`."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    def build() -> tuple[Any, Any, Callable[[Any, Any], Any]]:
        config = ViTMAEConfig(
            image_size=SIDE, patch_size=PATCH, hidden_size=384, num_hidden_layers=12, num_attention_heads=6,
            intermediate_size=1536, decoder_hidden_size=WIDTH, decoder_num_hidden_layers=DEPTH,
            decoder_num_attention_heads=HEADS, decoder_intermediate_size=4 * WIDTH, mask_ratio=RATIO,
            norm_pix_loss=True,
        )  # fmt: skip
        model = ViTMAEForPreTraining(config)
        return model, model.vit, lambda forward, images: forward(pixel_values=images).loss

    return lambda: plain(precision, compile, build)


def lightly_arm(precision: str, compile: bool) -> Callable[[], tuple[dict[str, int], Step]]:
    """The masked ViT and the MAE decoder of lightly, put together as its MAE example does."""
    import timm
    import torch
    from lightly.models import utils
    from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM

    class Autoencoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            vit = timm.create_model("vit_small_patch16_224", num_classes=0, global_pool="")
            self.backbone = MaskedVisionTransformerTIMM(vit=vit)
            self.decoder = MAEDecoderTIMM(
                num_patches=vit.patch_embed.num_patches, patch_size=PATCH, embed_dim=vit.embed_dim,
                decoder_embed_dim=WIDTH, decoder_depth=DEPTH, decoder_num_heads=HEADS, mlp_ratio=4.0,
                proj_drop_rate=0.0, attn_drop_rate=0.0,
            )  # fmt: skip

        def forward(self, images: Any) -> Any:
            length = self.backbone.sequence_length
            keep, hidden = utils.random_token_mask(size=(len(images), length), mask_ratio=RATIO, device=images.device)
            seen = self.decoder.embed(self.backbone.encode(images=images, idx_keep=keep))
            tokens = utils.repeat_token(self.decoder.mask_token, (len(images), length))
            tokens = utils.set_at_index(tokens, keep, seen.type_as(tokens))
            predicted = self.decoder.predict(utils.get_at_index(self.decoder.decode(tokens), hidden))
            target = utils.get_at_index(utils.patchify(images, PATCH), hidden - 1)
            return predicted, utils.normalize_mean_var(target)

    def build() -> tuple[Any, Any, Callable[[Any, Any], Any]]:
        model = Autoencoder()
        # Of the backbone, the mask token belongs to other methods and gets no gradient here.
        model.backbone.mask_token.requires_grad_(False)
        return model, model.backbone, lambda forward, images: torch.nn.functional.mse_loss(*forward(images))

    return lambda: plain(precision, compile, build)


def stable_pretraining_arm(precision: str, compile: bool) -> Callable[[], tuple[dict[str, int], Step]]:
    """`stable_pretraining.methods.mae.MAE`."""
    from stable_pretraining.methods.mae import MAE

    def build() -> tuple[Any, Any, Callable[[Any, Any], Any]]:
        model = MAE(
            "vit_small_patch16_224", decoder_embed_dim=WIDTH, decoder_depth=DEPTH, decoder_num_heads=HEADS,
            mask_ratio=RATIO,
        )  # fmt: skip
        return model, model.encoder, lambda forward, images: forward(images).loss

    return lambda: plain(precision, compile, build)


def choose(arm: str, precision: str, compile: bool) -> Callable[[], tuple[dict[str, int], Step]]:
    """The maker of an arm; what it needs is imported here, so that memory can be counted from then on."""
    if arm in PEERS:
        makers = {"transformers": transformers_arm, "lightly": lightly_arm}
        return makers.get(arm, stable_pretraining_arm)(precision, compile)
    if arm == "products":
        return products_arm(precision)
    target, decoder, predict = {
        "pixel": ("pixel", "self", 1.0),
        "token": ("token", "self", 1.0),
        "pixel cross": ("pixel", "cross", 1.0),
        "pixel cross 1/4": ("pixel", "cross", 0.25),
    }[arm]
    return ours(target, decoder, predict, precision, compile)


def main() -> None:
    """Answer each `step` with its seconds and loss, and `end` with the memory used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arm", required=True)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--peers", help="folder with the peers' packages; ours come first")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print does not belong among the answers
    if options.peers:
        sys.path.append(options.peers)
    if options.arm not in PEERS:  # ours as its command line starts it
        from clustermim.heap import keep_freed_memory

        keep_freed_memory()
    import torch

    torch.set_num_threads(options.threads)
    try:
        make = choose(options.arm, options.precision, options.compile)
        before = start_peak()
        sizes, step = make()
    except Exception as problem:
        answers.write(json.dumps({"problem": f"{type(problem).__name__}: {problem}"}) + "\n")
        return
    answers.write(json.dumps({"parameters": sizes}) + "\n")
    for line in sys.stdin:
        if line.strip() != "step":
            break
        began = time.perf_counter()
        loss = step()
        answers.write(json.dumps({"seconds": time.perf_counter() - began, "loss": loss}) + "\n")
    answers.write(json.dumps({"memory_mib": peak_above(before)}) + "\n")


if __name__ == "__main__":
    main()
