"""The model card that goes into an exported folder: what the encoder is, what it was trained on, how it is loaded."""

from pathlib import Path
from typing import Any

from clustermim.encoders.exports.subject import Subject

_PAPER = "https://arxiv.org/abs/2407.09087"
_SETTINGS = ("target", "tokenizer", "epochs", "batch_size", "mask_ratio", "norm_pix", "seed")


def model_card(subject: Subject, *, library: str, usage: str) -> str:
    """A README.md with the hub's metadata.

    Parameters
    ----------
    subject
        The exported encoder.
    library
        `timm` or `transformers`, as the hub spells them.
    usage
        Python that loads it.

    Returns
    -------
    str
        Markdown.
    """
    height, width = subject.image_size
    data: dict[str, Any] = subject.manifest.get("data") or {}
    model = subject.manifest["model"]
    rows = {
        "architecture": f"`{model['name']}` with `{model['kwargs']}`",
        "input": f"{subject.encoder.channels} channel(s), {height} × {width} pixels, values in [0, 1], then normalised",
        "mean": ", ".join(f"{value:.6g}" for value in subject.mean),
        "std": ", ".join(f"{value:.6g}" for value in subject.std),
        "parameters": f"{sum(p.numel() for p in subject.encoder.model.parameters()):,}",
    }
    if data.get("name"):
        source = Path(data["name"]).name
        split = f", split {data['split']}" if data.get("split") else ""
        images = f", {data['images']:,} images" if data.get("images") else ""
        rows["made from" if subject.manifest.get("kind") == "import" else "pretrained on"] = f"{source}{split}{images}"
    settings = subject.settings
    told = {name: settings[name] for name in _SETTINGS if settings.get(name) is not None}
    if "tokenizer" in told:
        told["tokenizer"] = Path(str(told["tokenizer"])).name  # where it lay is nobody's business
    rows |= {name.replace("_", " "): f"{value}" for name, value in told.items()}
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return (
        f"---\nlibrary_name: {library}\npipeline_tag: image-feature-extraction\n"
        f"tags:\n- {library}\n- image-feature-extraction\n- clustermim\n---\n\n"
        f"# {subject.run.name}\n\n"
        f"A vision transformer of the `clustermim` package (masked image modelling on patch tokens, "
        f"[paper]({_PAPER})). It has no classifier: it gives features.\n\n"
        f"| | |\n|---|---|\n{table}\n\n"
        f"## How it is loaded\n\n```python\n{usage}```\n"
    )
