"""The learned tokenizer: gradients, moving averages, dead codes, exact resumption, and that it learns."""

import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from clustermim.data.loaders import make_loader
from clustermim.data.sources import ImageSource, open_source
from clustermim.errors import InputError, NonFiniteLossError, Stopped
from clustermim.runs import RunDirectory
from clustermim.tokenizers.fitting import fit
from clustermim.tokenizers.vqvae.fitting import check, fit_vqvae, held_out
from clustermim.tokenizers.vqvae.model import VQVAE
from clustermim.tokenizers.vqvae.network import Decoder, Encoder, prime_factors
from clustermim.tokenizers.vqvae.quantiser import EMAQuantiser, GumbelQuantiser, Quantiser
from clustermim.tokenizers.vqvae.tokenizer import VQVAETokenizer
from clustermim.tokenizers.vqvae.training import VQVAEConfig
from clustermim.training.checkpoints import Checkpoints
from clustermim.training.launch import StopRequest, make_fabric

K, DIM = 6, 3
IMAGES = np.random.default_rng(0).integers(0, 256, (40, 6, 9, 2), dtype=np.uint8)
TINY: dict[str, Any] = {"width": 8, "depth": 1, "code_dim": DIM, "log_every": 2}


def gaussian(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ema(seed: int = 0, **changes: Any) -> EMAQuantiser:
    options: dict[str, Any] = {"decay": 0.9, "commitment": 0.25, "restart_below": 0.03} | changes
    made = EMAQuantiser(K, DIM, seed=seed, **options)
    made.start(gaussian(1, K, DIM), 1.0, 48)
    return made


def quantisers() -> dict[str, Quantiser]:
    gumbel = GumbelQuantiser(K, DIM, seed=0, kl_weight=5e-4)
    gumbel.start(gaussian(1, K, DIM), 1.0, 48)
    return {"ema": ema(), "gumbel": gumbel}


def network(quantiser: Quantiser) -> VQVAE:
    return VQVAE(quantiser, patch_size=3, mean=[0.4, 0.5], std=[0.2, 0.3], width=8, depth=1, seed=0)


# ---------------------------------------------------------------------------------------------------------------------
# The parts


@pytest.mark.parametrize("patch_size", [1, 2, 3, 4, 6, 7, 12, 16])
def test_any_patch_side_gives_its_grid_and_the_pixels_back(patch_size: int) -> None:
    sizes = {"channels": 2, "patch_size": patch_size, "width": 8, "depth": 1, "code_dim": 5}
    for rows, columns in ((1, 1), (2, 3)):
        images = torch.rand(2, 2, rows * patch_size, columns * patch_size)
        z = Encoder(**sizes)(images)
        assert z.shape == (2, 5, rows, columns)
        assert Decoder(**sizes)(z).shape == images.shape
    assert np.prod(prime_factors(patch_size), dtype=int) == patch_size


@pytest.mark.parametrize("name", ["ema", "gumbel"])
def test_gradients_reach_every_parameter(name: str) -> None:
    model = network(quantisers()[name])
    loss, figures = model(torch.rand(4, 2, 6, 9), torch.arange(4), 0, 1.0)
    loss.backward()
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in model.parameters())
    assert figures["reconstruction_mse"].isfinite()


def test_the_gradient_passes_straight_through() -> None:
    z = gaussian(2, 48, DIM).requires_grad_()
    found = ema(commitment=0.0)(z, torch.arange(4), 0, 1.0)
    arriving = gaussian(3, 48, DIM)
    (found.codes * arriving).sum().backward()
    torch.testing.assert_close(z.grad, arriving)
    torch.testing.assert_close(found.codes.detach(), gaussian(1, K, DIM)[found.ids], atol=1e-6, rtol=0)


def test_moving_averages_equal_a_naive_loop() -> None:
    made = ema(restart_below=0.0)
    codes = gaussian(1, K, DIM).double()
    counts, sums = torch.full((K,), 48 / K).double(), codes * (48 / K)
    for step in range(5):
        z = gaussian(10 + step, 48, DIM)
        nearest = [int((row.double() - codes).square().sum(1).argmin()) for row in z]
        assert made(z, torch.arange(4), step, 1.0).ids.tolist() == nearest
        for code in range(K):
            mine = [row.double() for row, i in zip(z, nearest, strict=True) if i == code]
            counts[code] = 0.9 * counts[code] + 0.1 * len(mine)
            sums[code] = 0.9 * sums[code] + 0.1 * sum(mine, torch.zeros(DIM, dtype=torch.float64))
            codes[code] = sums[code] / counts[code]
        torch.testing.assert_close(made.codes.double(), codes, atol=1e-4, rtol=1e-4)
    assert int(made.usage.sum()) == 5 * 48


def test_dead_codes_are_put_on_rows_of_the_step_and_others_left_alone() -> None:
    made = ema(restart_below=0.5, decay=0.0)
    made.codes[2:] = 1000.0 + gaussian(4, K - 2, DIM)  # no row is near these
    z = gaussian(5, 48, DIM)
    found = made(z, torch.arange(4), 7, 1.0)
    assert int(found.figures["restarted"]) == K - 2
    apart = torch.cdist(made.codes[2:], z).min(1).values
    assert float(apart.max()) < 1e-3
    again = ema(restart_below=0.5, decay=0.0)
    again.codes.copy_(torch.cat([gaussian(1, 2, DIM) * 0 + gaussian(1, K, DIM)[:2], 1000.0 + gaussian(4, K - 2, DIM)]))
    again(z, torch.arange(4), 8, 1.0)
    assert not torch.equal(again.codes[2:], made.codes[2:])  # another step, other rows
    torch.testing.assert_close(again.codes[:2], made.codes[:2])


def test_outside_training_nothing_moves_and_codes_are_unmixed() -> None:
    z = gaussian(5, 48, DIM)
    for made in quantisers().values():
        before = {key: value.clone() for key, value in made.state_dict().items()}
        found = made.eval()(z, torch.arange(4), 0, 1.0)
        assert all(torch.equal(value, before[key]) for key, value in made.state_dict().items())
        torch.testing.assert_close(found.codes, made.codes[found.ids], atol=1e-6, rtol=0)
        assert torch.equal(found.ids, torch.cdist(z.double(), made.codes.double()).argmin(1))


def test_gumbel_draws_are_counted_and_follow_the_softmax() -> None:
    made = quantisers()["gumbel"]
    assert isinstance(made, GumbelQuantiser)
    z = gaussian(5, 12, DIM)
    whole = made(z, torch.arange(4), 3, 0.5).codes
    parts = [made(z[3 * i : 3 * i + 6], torch.arange(i, i + 2), 3, 0.5).codes for i in (0, 2)]
    torch.testing.assert_close(torch.cat(parts), whole)
    assert not torch.allclose(made(z, torch.arange(4), 4, 0.5).codes, whole)
    # Cold draws are single codes, taken as often as the softmax says (Gumbel-max).
    one = z[:1].expand(4000, DIM)
    mixed = made(one, torch.arange(4000), 0, 1e-4).codes
    drawn = torch.bincount(torch.cdist(mixed, made.codes.detach()).argmin(1), minlength=K) / 4000
    logits = (2 * one[0] @ made.codes.t() - made.codes.square().sum(1)) * made.log_scale.exp()
    torch.testing.assert_close(drawn, logits.softmax(0).detach(), atol=0.03, rtol=0)


def test_perplexity_counts_even_use() -> None:
    made = ema()
    made.count(torch.tensor([5, 5, 0, 0, 5, 5]))
    assert made.perplexity_and_used() == (pytest.approx(4.0), 4)
    made.forget_usage()
    assert not made.usage.any()


# ---------------------------------------------------------------------------------------------------------------------
# Training


def go(folder: Path, *, resume: bool = False, stop: StopRequest | None = None, **changes: Any) -> Any:
    config = VQVAEConfig(**TINY | {"epochs": 4, "checkpoint_every": "3", "free": 0.25} | changes)
    source = open_source(IMAGES)
    fabric = make_fabric("cpu", 1, config.precision)
    with RunDirectory(folder, "tokenizer fit", {}, resume=resume) as run:
        made = fit_vqvae(
            source, patch_size=3, k=K, seed=0, batch_size=16, config=config, fabric=fabric, workers=None, facts={},
            run=run, checkpoints=Checkpoints(folder / "checkpoints"), stop=stop,
        )  # fmt: skip
        return made, list(run.metrics())


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in rows]


class StopAfter(StopRequest):
    """Asks to stop at the given look."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self.left = looks

    @property
    def reason(self) -> str | None:
        self.left -= 1
        return "by SIGTERM" if self.left < 0 else None


@pytest.mark.parametrize("estimator", ["ema", "gumbel"])
def test_stopped_and_resumed_is_bit_identical(tmp_path: Path, estimator: Any) -> None:
    whole, rows = go(tmp_path / "whole", estimator=estimator)
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    for wait in (0, 2):
        with pytest.raises(Stopped, match="--resume") as stopped:
            go(tmp_path / "parts", estimator=estimator, resume=wait > 0, stop=StopAfter(wait))
        assert stopped.value.exit_code == 75
    parts, resumed = go(tmp_path / "parts", estimator=estimator, resume=True)
    assert parts.fingerprint() == whole.fingerprint()
    assert timeless(resumed) == timeless(rows)
    wanted = {"step", "epoch", "images", "loss", "lr", "seconds", "images_per_second", "perplexity", "used_codes"}
    assert wanted | {"reconstruction_mse"} <= set(rows[0])
    assert set(rows[0]) >= ({"restarted", "commitment"} if estimator == "ema" else {"kl", "temperature"})


def test_nan_names_its_step_and_keeps_the_good_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, calls = VQVAE.forward, iter(range(1, 100))

    def spoilt(self: VQVAE, *args: Any) -> Any:
        loss, figures = plain(self, *args)
        return loss * (float("nan") if next(calls) == 5 else 1.0), figures

    monkeypatch.setattr(VQVAE, "forward", spoilt)
    with pytest.raises(NonFiniteLossError, match="step 5") as error:
        go(tmp_path / "a")
    assert error.value.exit_code == 3
    found = Checkpoints(tmp_path / "a" / "checkpoints").load_latest()
    assert found is not None and found[0] == 3


@pytest.fixture(scope="module")
def digits() -> Iterator[VQVAETokenizer]:
    source = open_source("digits")
    config = VQVAEConfig(epochs=12, width=32, depth=1, code_dim=8, lr=3e-3)
    made = fit(source, patch_size=2, k=40, kind="vqvae", batch_size=128, vqvae=config)
    assert isinstance(made, VQVAETokenizer)
    yield made


def test_it_learns_digits(digits: VQVAETokenizer) -> None:
    facts = digits.facts
    assert facts["reconstruction_mse"] < 0.3 * facts["mean_mse"]
    assert facts["train_reconstruction_mse"] == pytest.approx(facts["reconstruction_mse"], rel=0.25)
    assert facts["perplexity"] > 10 and facts["used_tokens"] > 20
    assert facts["held_out_images"] + facts["training_images"] == facts["images"]


def test_encoding_is_the_nearest_code_and_decoding_shows_it(digits: VQVAETokenizer) -> None:
    source = open_source("digits", split="test")
    batch = next(iter(make_loader(source, batch_size=64, train=False)))
    ids = digits.encode(batch.images)
    described = digits.features(batch.images).flatten(0, 1)
    assert torch.equal(ids.flatten(), torch.cdist(described.double(), digits.codebook.centroids.double()).argmin(1))
    again = digits.decode(ids)
    assert again.shape == batch.images.shape
    flat = (batch.images - batch.images.mean()).square().mean()
    assert float((again - batch.images).square().mean()) < 0.3 * float(flat)
    other = torch.rand(2, 1, 4, 14)
    assert digits.decode(digits.encode(other), (2, 7)).shape == other.shape
    pictures = digits.code_pictures()
    assert pictures.shape == (40, 1, 2, 2) and float(pictures.min()) >= 0 and float(pictures.max()) <= 1
    with pytest.raises(InputError, match="4 × 4"):
        digits.decode(digits.encode(other))
    with pytest.raises(InputError, match="another tokenizer"):
        digits.decode(torch.full((1, 16), 40))


def test_held_out_images_keep_groups_whole_and_need_no_labels() -> None:
    source = open_source("digits")
    assert int(held_out(source).sum()) == round(0.05 * len(source))
    source.groups = np.arange(len(source)) // 50
    apart = held_out(source)
    assert apart.any() and all(len(set(apart[source.groups == g])) == 1 for g in np.unique(source.groups))
    unlabelled = open_source(IMAGES)
    part = unlabelled.subset(np.flatnonzero(held_out(unlabelled)))
    assert len(part) == 2 and part.view == unlabelled.view


def test_bad_input_is_refused_before_any_work() -> None:
    def ask(source: ImageSource, **changes: Any) -> None:
        check(source, **{"patch_size": 3, "k": K, "batch_size": 16, "processes": 1} | changes)

    source = open_source(IMAGES)
    ask(source)
    for changes, told in (
        ({"k": 1}, "at least 2"),
        ({"k": 1000}, "k = 1000 is more than there are patches to learn from: 228 in 38"),
        ({"patch_size": 4}, "does not divide"),
        ({"batch_size": 0}, "--batch-size"),
        ({"batch_size": 15, "processes": 2}, "cannot be divided"),
    ):
        with pytest.raises(InputError, match=told):
            ask(source, **changes)
    with pytest.raises(InputError, match="at least 2"):
        ask(open_source(IMAGES[:1]))
    for options in (
        {"epochs": 0}, {"lr": 0.0}, {"width": 0}, {"depth": -1}, {"code_dim": 0}, {"ema_decay": 1.0},
        {"commitment": -1.0}, {"free": 1.0}, {"restart_below": 1.0}, {"temperature": (0.1, 1.0)}, {"kl_weight": -1.0},
        {"checkpoint_every": "now"}, {"log_every": 0},
    ):  # fmt: skip
        with pytest.raises(InputError, match=f"--{next(iter(options)).replace('_', '-')}"):
            VQVAEConfig(**options)  # type: ignore[arg-type]


def test_more_codes_than_distinct_patches() -> None:
    with pytest.raises(InputError, match="distinct"):
        fit(open_source(np.zeros((40, 6, 9, 2), np.uint8)), patch_size=3, k=50, kind="vqvae", vqvae=VQVAEConfig(**TINY))


# ---------------------------------------------------------------------------------------------------------------------
# Two processes


def _one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    made = ema(restart_below=0.9)
    for step in range(3):
        z = gaussian(20 + step, 48, DIM)
        made(z[24 * rank : 24 * rank + 24], torch.arange(2 * rank, 2 * rank + 2), step, 1.0)
    torch.save(made.state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_make_the_codes_of_one(tmp_path: Path) -> None:
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["clustermim.tokenizers.vqvae.quantiser"])
    both = [processes.Process(target=_one_of_two, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
        assert process.exitcode == 0
    alone = ema(restart_below=0.9)
    for step in range(3):
        alone(gaussian(20 + step, 48, DIM), torch.arange(4), step, 1.0)
    for rank in range(2):
        state = torch.load(tmp_path / f"{rank}.pt")
        assert all(torch.equal(state[key], value) for key, value in alone.state_dict().items())
