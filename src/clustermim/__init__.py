"""clustermim: masked image modelling on K-means patch tokens.

The public API is imported lazily (PEP 562), so that `import clustermim` and `clustermim --help` do not import torch.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# name -> module that defines it
_API = {
    "open_source": "clustermim.data.sources",
    "DataOptions": "clustermim.data.options",
    "make_loader": "clustermim.data.loaders",
    "open_encoder": "clustermim.encoders.opening",
    "make_features": "clustermim.features.patches",
    "Tokenizer": "clustermim.tokenizers.tokenizer",
    "load_tokenizer": "clustermim.tokenizers.tokenizer",
    "score_tokens": "clustermim.scoring.tcas",
    "TokenScore": "clustermim.scoring.tcas",
    "augmentation_spectrum": "clustermim.scoring.graph",
    "MaskedImageModel": "clustermim.mim.model",
    "fit_tokenizer": "clustermim.verbs.tokenizer_fit",
    "import_tokenizer": "clustermim.verbs.tokenizer_import",
    "show_tokenizer": "clustermim.verbs.tokenizer_show",
    "tokenize": "clustermim.verbs.tokenize_images",
    "tcas": "clustermim.verbs.score",
    "graph": "clustermim.verbs.graph_spectrum",
    "pretrain": "clustermim.verbs.pretrain_encoder",
    "WatchOptions": "clustermim.verbs.pretrain_watch",
    "probe": "clustermim.verbs.probe_encoders",
    "finetune": "clustermim.verbs.finetune_encoder",
    "embed": "clustermim.verbs.embed_images",
    "show": "clustermim.verbs.show_run",
    "export_encoder": "clustermim.verbs.export_run",
    "import_checkpoint": "clustermim.verbs.import_file",
    "demo": "clustermim.studies.demo_command",
    "study": "clustermim.studies.command",
    "pack_study": "clustermim.studies.packing_commands",
    "unpack_study": "clustermim.studies.packing_commands",
}

__all__ = [
    "DataOptions",
    "MaskedImageModel",
    "TokenScore",
    "Tokenizer",
    "WatchOptions",
    "__version__",
    "augmentation_spectrum",
    "demo",
    "embed",
    "export_encoder",
    "finetune",
    "fit_tokenizer",
    "graph",
    "import_checkpoint",
    "import_tokenizer",
    "load_tokenizer",
    "make_features",
    "make_loader",
    "open_encoder",
    "open_source",
    "pack_study",
    "pretrain",
    "probe",
    "score_tokens",
    "show",
    "show_tokenizer",
    "study",
    "tcas",
    "tokenize",
    "unpack_study",
]

if TYPE_CHECKING:
    from clustermim.data.loaders import make_loader
    from clustermim.data.options import DataOptions
    from clustermim.data.sources import open_source
    from clustermim.encoders.opening import open_encoder
    from clustermim.features.patches import make_features
    from clustermim.mim.model import MaskedImageModel
    from clustermim.scoring.graph import augmentation_spectrum
    from clustermim.scoring.tcas import TokenScore, score_tokens
    from clustermim.studies.command import study
    from clustermim.studies.demo_command import demo
    from clustermim.studies.packing_commands import pack_study, unpack_study
    from clustermim.tokenizers.tokenizer import Tokenizer, load_tokenizer
    from clustermim.verbs.embed_images import embed
    from clustermim.verbs.export_run import export_encoder
    from clustermim.verbs.finetune_encoder import finetune
    from clustermim.verbs.graph_spectrum import graph
    from clustermim.verbs.import_file import import_checkpoint
    from clustermim.verbs.pretrain_encoder import pretrain
    from clustermim.verbs.pretrain_watch import WatchOptions
    from clustermim.verbs.probe_encoders import probe
    from clustermim.verbs.score import tcas
    from clustermim.verbs.show_run import show
    from clustermim.verbs.tokenize_images import tokenize
    from clustermim.verbs.tokenizer_fit import fit_tokenizer
    from clustermim.verbs.tokenizer_import import import_tokenizer
    from clustermim.verbs.tokenizer_show import show_tokenizer


def __getattr__(name: str) -> object:
    """Import the module that defines `name` on first use."""
    if name not in _API:
        raise AttributeError(f"module 'clustermim' has no attribute {name!r}")
    value = getattr(importlib.import_module(_API[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)
