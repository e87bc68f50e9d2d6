"""A folder that `timm.create_model("local-dir:...")` loads, and, put on the hub, `hf-hub:`."""

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
from torch import Tensor

from clustermim.encoders.contract import EncoderOutput
from clustermim.encoders.exports.card import model_card
from clustermim.encoders.exports.subject import Subject, check_difference
from clustermim.encoders.timm_encoder import TimmEncoder


def write_timm(subject: Subject, folder: Path, shown: Path) -> dict[str, Any]:
    """Write config.json, model.safetensors and README.md.

    Parameters
    ----------
    subject
        What to export.
    folder
        An empty folder to write into.
    shown
        Where it will stand, for the card and for messages.

    Returns
    -------
    dict
        `max_difference`: between the features of the run and of what timm loads from the folder.

    Raises
    ------
    InputError
        timm gives other features from it.
    """
    model = subject.encoder.model
    name, kwargs = subject.manifest["model"]["name"], subject.manifest["model"]["kwargs"]
    height, width = subject.image_size
    made = model.pretrained_cfg
    config = {
        "architecture": name,
        "num_classes": 0,
        "num_features": int(model.num_features),
        "global_pool": str(getattr(model, "global_pool", "")),
        "model_args": kwargs,
        "pretrained_cfg": {
            "num_classes": 0,
            "input_size": [subject.encoder.channels, height, width],
            "fixed_input_size": bool(made.get("fixed_input_size", True)),
            "pool_size": None,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": subject.mean,
            "std": subject.std,
            "first_conv": made.get("first_conv"),
            "classifier": made.get("classifier"),
        },
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    safetensors.torch.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    usage = (
        "import timm\n\n"
        f'model = timm.create_model("local-dir:{shown.name}", pretrained=True).eval()\n'
        '# once it is on the hub: "hf-hub:owner/name"\n'
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))\n"
    )
    (folder / "README.md").write_text(model_card(subject, library="timm", usage=usage))

    loaded: Any = timm.create_model(f"local-dir:{folder}", pretrained=True)
    again = TimmEncoder(
        loaded,
        "the export",
        image_size=subject.image_size,
        channels=subject.encoder.channels,
        mean=loaded.pretrained_cfg["mean"],
        std=loaded.pretrained_cfg["std"],
    )

    def forward(images: Tensor) -> EncoderOutput:
        output: EncoderOutput = again(images)
        return output

    difference = subject.difference(forward)
    check_difference(difference, 1e-5, str(shown))
    return {"max_difference": difference}
