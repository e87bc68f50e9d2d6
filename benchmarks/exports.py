"""How far exported features are from those of the run: ViT-Ti and ViT-S, two image sizes, timm, transformers, ONNX.

    python benchmarks/exports.py            all of it, a few minutes on two cores
    python benchmarks/exports.py --quick    ViT-Ti of 32 × 48 pixels only

The encoders have random weights of the size that training leaves (every parameter drawn, none left at its initial zero
or one), so that no bias or norm can hide a mistake.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from recording import record

from clustermim.encoders.presets import model_kwargs
from clustermim.runs import RunDirectory
from clustermim.verbs.export_run import export_encoder

FORMATS = {"timm": ("timm", 1e-5), "transformers": ("transformers", 1e-5), "onnx": ("encoder.onnx", 1e-4)}
"""Format -> (what to write, largest allowed difference)."""


def write_run(folder: Path, preset: str, size: tuple[int, int], patch_size: int) -> Path:
    name, kwargs = model_kwargs(preset, size, patch_size, 3)
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs, num_classes=0)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    data = {"image_size": list(size), "channels": 3, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    with RunDirectory(folder, "pretrain", {}) as run:
        safetensors.torch.save_file(model.state_dict(), run.path / "encoder.safetensors")
        run.finish({"model": {"name": name, "kwargs": kwargs}, "data": data})
    return folder


def measure(preset: str, size: tuple[int, int], patch_size: int) -> list[dict[str, Any]]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        run = write_run(Path(folder) / "run", preset, size, patch_size)
        for format, (name, allowed) in FORMATS.items():
            result = export_encoder(run, format=format, out=Path(folder) / name)  # type: ignore[arg-type]
            row = {"model": preset, "image_size": f"{size[0]}x{size[1]}", "patch_size": patch_size, "format": format}
            rows.append(row | {"max_difference": result.figures["max_difference"], "allowed": allowed})
            shown = f"{rows[-1]['max_difference']:.1e}  (allowed {allowed:.0e})"
            print(f"{preset:8} {row['image_size']:>8} {format:13} {shown}")
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small case")
    quick = parser.parse_args().quick
    cases = [(preset, size, 16) for preset in ("vit_ti", "vit_s") for size in ((224, 224), (160, 192))]
    if quick:
        cases = [("vit_ti", (32, 48), 8)]
    found = [row for case in cases for row in measure(*case)]
    print(record("exports_quick" if quick else "exports", found, images=2))
