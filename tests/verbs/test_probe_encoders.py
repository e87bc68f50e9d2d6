"""`clustermim probe`, as a function and through the command line."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from torch import nn

from clustermim.cli import run
from clustermim.errors import InputError
from clustermim.verbs.probe_encoders import probe


def make_data(n: int = 120, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Grey 8 × 8 images whose brightness tells the class, nearly."""
    labels = np.arange(n) % classes
    noise = np.random.default_rng(0).random((n, 8, 8))
    return (255 * (0.4 * noise + 0.6 * labels[:, None, None] / classes)).astype(np.uint8), labels


def printed(result: Any) -> str:
    console = Console(width=160, file=io.StringIO())
    console.print(result)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_several_encoders_on_several_data_sets(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    module = nn.Sequential(nn.Conv2d(1, 8, 4, 4), nn.ReLU())
    result = probe(["raw-pixels", "random:vit_micro", module], [make_data(), "digits"], protocol=["knn"], json=file)
    rows = result.rows()
    assert json.loads(file.read_text()) == rows
    assert {row["encoder"] for row in rows} == {"raw-pixels", "random:vit_micro", "Sequential"}
    assert len({row["data"] for row in rows}) == 2 and len(rows) == 2 * (1 + 2 + 1)
    text = printed(result)
    assert "top-1 accuracy in % on 359 test images of 10 classes" in text and "random:vit_micro" in text
    assert "±" in text


def test_one_of_each_needs_no_list() -> None:
    first = probe("raw-pixels", make_data(), protocol=("linear",)).rows()
    second = probe(["raw-pixels"], [make_data()], protocol=["linear"]).rows()
    assert first == second and len(first) == 1


def test_every_layer_has_a_line() -> None:
    result = probe("random:vit_micro", make_data(60), protocol=["knn"], layers="all")
    assert [row["layer"] for row in result.rows()] == [layer for layer in range(6) for _ in range(2)]
    assert "layer" in printed(result)


def test_two_of_one_name_are_told_apart() -> None:
    rows = probe(["raw-pixels", "raw-pixels"], make_data(60), protocol=["knn"]).rows()
    assert [row["encoder"] for row in rows] == ["raw-pixels", "raw-pixels (2)"]


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, labels = make_data()
    np.savez(tmp_path / "some.npz", x=images, y=labels)
    file = tmp_path / "rows.json"
    words = (
        f"probe --encoder raw-pixels random:test_resnet --data {tmp_path}/some.npz digits --protocol knn --json {file}"
    )
    assert run([*words.split(), "--limit", "100"]) == 0
    shown = capsys.readouterr().out
    assert "raw-pixels" in shown and "random:test_resnet" in shown
    rows = json.loads(file.read_text())
    assert [(row["encoder"], row["protocol"]) for row in rows] == 2 * [
        ("raw-pixels", "knn"),
        ("random:test_resnet", "knn"),
    ]
    recipe = tmp_path / "probe.yaml"
    recipe.write_text(f"encoder: [raw-pixels]\ndata: [{tmp_path}/some.npz]\nprotocol: [linear]\n")
    assert run(["probe", "--config", str(recipe), "--json", str(file)]) == 0
    assert [row["protocol"] for row in json.loads(file.read_text())] == ["linear"]


def test_finished_rows_are_kept_and_only_what_is_missing_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clustermim.verbs import probe_encoders

    asked: list[tuple[str, list[str]]] = []
    true = probe_encoders.evaluate

    def watched(encoder: Any, train: Any, test: Any, protocols: list[str], *rest: Any) -> Any:
        asked.append((encoder.name, protocols))
        if encoder.name == "random:test_resnet" and len(asked) == 2:
            raise KeyboardInterrupt
        return true(encoder, train, test, protocols, *rest)

    monkeypatch.setattr(probe_encoders, "evaluate", watched)
    file, data = tmp_path / "rows.json", make_data(60)
    both: list[Any] = ["raw-pixels", "random:test_resnet"]
    with pytest.raises(KeyboardInterrupt):
        probe(both, data, protocol=["knn"], json=file)
    assert [row["encoder"] for row in json.loads(file.read_text())] == ["raw-pixels"]
    rows = probe(both, data, protocol=["knn", "retrieval"], json=file, resume=True).rows()
    assert asked[2:] == [("raw-pixels", ["retrieval"]), ("random:test_resnet", ["knn", "retrieval"])]
    assert json.loads(file.read_text()) == rows
    assert list(dict.fromkeys((row["encoder"], row["protocol"]) for row in rows)) == [
        (name, protocol) for name in both for protocol in ("knn", "retrieval")
    ]
    # Another seed is another question.
    probe("raw-pixels", data, protocol=["knn"], json=file, resume=True, seed=1)
    assert len(asked) == 5 and len(json.loads(file.read_text())) == len(rows) + 1


def test_confusion_matrices_stand_in_files_with_class_names(tmp_path: Path) -> None:
    result = probe("raw-pixels", make_data(60), protocol=["knn"], confusion=tmp_path / "confusion")
    (file,) = (tmp_path / "confusion").iterdir()
    lines = file.read_text().splitlines()
    assert lines[0] == "true class,0,1,2" and len(lines) == 4
    counts = np.array([line.split(",")[1:] for line in lines[1:]], dtype=int)
    row = result.rows()[0]
    assert counts.sum() == row["n_test"] and counts.trace() == round(row["top1"] * row["n_test"])


def test_transfer_all_data_sets_in_one_call(tmp_path: Path) -> None:
    data = [make_data(60), "digits"]
    names = ["knn", "fewshot", "retrieval", "cluster"]
    rows = probe("raw-pixels", data, protocol=names, shots=(1, 2), draws=2).rows()
    assert len(rows) == 2 * (1 + 2 + 1 + 1) and len({row["data"] for row in rows}) == 2
    assert {"nmi", "ari"} <= set(rows[-1])
    text = printed(probe("raw-pixels", make_data(60), protocol=names, shots=(1, 2), draws=2))
    assert all(title in text for title in ("k-NN", "1-shot", "2-shot", "retrieval mAP", "clustering"))


def test_patches_are_judged_by_masks_and_images_by_labels_in_one_call(tmp_path: Path) -> None:
    images, labels = make_data(60)
    np.savez(tmp_path / "masks.npz", masks=(images > 120).astype(np.uint8))
    file, names = tmp_path / "rows.json", ["knn", "patch-knn", "patch-linear"]
    encoder = "random:vit_micro?patch_size=2"
    result = probe(encoder, (images, labels), protocol=names, masks=tmp_path / "masks.npz", json=file)
    assert {row["protocol"] for row in result.rows()} == set(names)
    assert all("miou" in row for row in result.rows() if row["protocol"] != "knn") and "patch k-NN" in printed(result)
    again = probe(encoder, (images, labels), protocol=names, masks=tmp_path / "masks.npz", json=file, resume=True)
    assert again.rows() == result.rows()
    with pytest.raises(InputError, match="single --data"):
        probe(encoder, [(images, labels), "digits"], protocol=names, masks=tmp_path / "masks.npz")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--encoder raw-pixels --data digits --protocol patch-knn", "give --masks"),
        ("--encoder raw-pixels --data digits --protocol fewshot --shots 2 500", "500 images a class is not possible"),
        ("--encoder raw-pixels --data digits --resume", "--json"),
        ("--encoder raw-pixels --data digits --protocol fewshot --draws 1", "at least 2 draws"),
        ("--encoder raw-pixel --data digits", "Did you mean 'raw-pixels'"),
        ("--encoder raw-pixels --data digit", "digits"),
        ("--encoder raw-pixels --data digits --protocol kn", "knn"),
        ("--encoder no/run --data digits", "no/run"),
        ("--encoder timm:test_vit@none.pth --data digits", "none.pth"),
        ("--encoder raw-pixels --data digits --json .", "is a folder"),
        ("--data digits", "--encoder"),
    ],
)
def test_bad_input(words: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["probe", *words.split()]) == 2
    captured = capsys.readouterr()
    assert expected in " ".join(captured.err.split()) and captured.out == ""


def test_everything_is_checked_before_anything_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*given: Any, **more: Any) -> None:
        raise AssertionError("work was started")

    monkeypatch.setattr("clustermim.verbs.probe_encoders.evaluate", never)
    images, labels = make_data(60)
    with pytest.raises(InputError, match="no model called 'vit_mikro'"):
        probe(["raw-pixels", "random:vit_mikro"], make_data(60))
    with pytest.raises(InputError, match="single class"):
        probe(["raw-pixels"], [make_data(60), (images, labels * 0)])
    with pytest.raises(InputError, match="labels"):
        probe("raw-pixels", images)
    with pytest.raises(InputError, match="nothing to judge"):
        probe([], "digits")


@pytest.mark.slow
def test_two_processes_give_the_rows_of_one(tmp_path: Path) -> None:
    rows = []
    for devices in ("1", "2"):
        file = tmp_path / f"{devices}.json"
        words = (
            "probe --encoder raw-pixels random:vit_micro --data digits --limit 203 --device cpu --protocol knn linear"
        )
        command = [sys.executable, "-m", "clustermim", *words.split(), "fewshot", "--devices", devices]
        subprocess.run([*command, "--json", str(file)], check=True)
        rows.append(json.loads(file.read_text()))
    for one, two in zip(*rows, strict=True):
        assert {k: v for k, v in one.items() if not isinstance(v, float)} == {
            k: v for k, v in two.items() if not isinstance(v, float)
        }
        assert one["top1"] == pytest.approx(two["top1"], abs=0.01)
