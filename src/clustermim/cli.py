"""The command line: registers the verbs by import string, so that only the verb in use is imported.

A verb is a typed Python function; cyclopts makes its options from the signature and its help from the docstring. The
function returns a result that is printed here: to stdout what was asked for, to stderr everything else.
"""

import contextlib
import errno
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, ArgumentCollection, CycloptsError, CycloptsPanel, Parameter, UnknownOptionError
from cyclopts.config import Dict, Yaml
from rich.console import Console

from clustermim import __version__
from clustermim.errors import ClusterMIMError, InputError, nearest
from clustermim.heap import keep_freed_memory
from clustermim.openmp import WAITING

_VERBS = {
    "demo": ("studies.demo_command:demo", "The whole idea on embedded images, in about two minutes."),
    "study": (
        "studies.command:study",
        "A grid of targets scored, trained, judged: which one, and did a score foretell it?",
    ),
    "study-pack": (
        "studies.packing_commands:pack_study",
        "What a study found so far in one small file, without the weights.",
    ),
    "study-unpack": ("studies.packing_commands:unpack_study", "Put such a file into a folder, to go on from there."),
    "tokenize": ("verbs.tokenize_images:tokenize", "Write the token ids of every image of a data set."),
    "tcas": ("verbs.score:tcas", "Score tokenizers with labelled images, before any training."),
    "graph": ("verbs.graph_spectrum:graph", "The augmentation graph of masked images, with tokens and without."),
    "pretrain": ("verbs.pretrain_encoder:pretrain", "Pretrain a ViT by masked image modelling."),
    "show": ("verbs.show_run:show", "What an encoder sees, as pictures and one page."),
    "export": (
        "verbs.export_run:export_encoder",
        "Give an encoder to timm, transformers, ONNX or code in MAE's layout.",
    ),
    "import": ("verbs.import_file:import_checkpoint", "Make a run of a checkpoint of MAE, DINO, iBOT, BEiT or timm."),
    "probe": ("verbs.probe_encoders:probe", "Judge encoders: k-NN, linear, few-shot, retrieval, clustering and more."),
    "finetune": ("verbs.finetune_encoder:finetune", "Train an encoder and a classifier together, and judge the two."),
    "embed": ("verbs.embed_images:embed", "Write the features of every image to a file."),
}
_TOKENIZER_VERBS = {
    "fit": ("verbs.tokenizer_fit:fit_tokenizer", "Fit a tokenizer to a data set, or make a control."),
    "import": (
        "verbs.tokenizer_import:import_tokenizer",
        "Make a tokenizer of centroids that were clustered elsewhere.",
    ),
    "show": ("verbs.tokenizer_show:show_tokenizer", "Vocabulary and token maps as pictures."),
}


_RESOURCE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENOMEM)
"""What the system says when disk or memory gives out, wherever it happens."""


class _OptionsFile(Yaml):
    """A flat file of options of whichever verb runs.

    cyclopts drops the keys of a flat file that are names of commands, and `tokenizer` is a command and an option. Put
    under the names of the command that runs, every key is an option.
    """

    def __call__(self, app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
        """Add the options to what the command line gave."""
        options: Any = self.config
        for name in reversed(commands):
            options = {name: options}
        Dict(options, source=self.source)(app, commands, arguments)


def build_app() -> App:
    """The command tree; nothing but this file and cyclopts is imported by building it."""
    app = App(
        name="clustermim",
        help="Masked image modelling on K-means patch tokens: tokenize, score, pretrain, judge, use in timm.",
        help_format="markdown",
        version=__version__,
        suppress_keyboard_interrupt=False,  # `run` tells it and returns the exit code
        result_action="return_value",
    )
    tokenizer = App(name="tokenizer", help="Fit or import tokenizers, and look at them.")
    for parent, verbs in ((app, _VERBS), (tokenizer, _TOKENIZER_VERBS)):
        for name, (target, summary) in verbs.items():
            parent.command(f"clustermim.{target}", name=name, help=summary)
        if parent is app:
            app.command(tokenizer)

    app.meta.suppress_keyboard_interrupt = False

    @app.meta.default
    def launch(
        *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
        config: Annotated[
            Path | None, Parameter(help="YAML file with any options of the verb; the command line overrides it.")
        ] = None,
    ) -> Any:
        _check_verb(tokens)
        if config is not None:
            if not config.is_file():
                raise InputError(f"--config {config}: there is no such file. Check the path.")
            app.config = (_OptionsFile(config),)
        return app(tokens, exit_on_error=False, print_error=False, result_action="return_value")

    return app


def _check_verb(tokens: Sequence[str]) -> None:
    """Name the nearest verb at once; cyclopts would first import every verb, and with them torch, to do so."""
    known: Sequence[str] = [*_VERBS, "tokenizer"]
    for depth, token in enumerate(tokens[:2]):
        if token.startswith("-"):
            return
        if token not in known:
            raise InputError(f"there is no verb {' '.join(tokens[: depth + 1])!r}.{nearest(token, known)}")
        if token != "tokenizer":
            return
        known = list(_TOKENIZER_VERBS)


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; messages go to stderr, results to stdout.

    Parameters
    ----------
    arguments
        What stands behind `clustermim`.

    Returns
    -------
    int
        0 done, 2 input, 3 non-finite loss, 4 disk, memory or worker, 75 stopped and resumable, 130 interrupted.
    """
    errors = Console(stderr=True)
    try:
        result = build_app().meta(list(arguments), exit_on_error=False, print_error=False, result_action="return_value")
    except UnknownOptionError as error:
        if error.token.source == "cli":
            errors.print(CycloptsPanel(error))
        else:
            _tell(errors, _unknown_key(error))
        return InputError.exit_code
    except CycloptsError as error:
        errors.print(CycloptsPanel(error))
        return InputError.exit_code
    except ClusterMIMError as error:
        if error.shared and _started_by_the_first():
            return 0  # the first process speaks, and its exit code counts
        _tell(errors, error)
        _tell_next(errors, arguments, error.again)
        return error.exit_code
    except KeyboardInterrupt as error:
        if _started_by_the_first():
            return 0
        again = getattr(error, "again", None)
        _print(errors, "Interrupted." if again is None else "Interrupted; a run that is begun can be continued.")
        _tell_next(errors, arguments, again)
        return 130
    except MemoryError:
        _print(errors, "Error: out of memory. Use a smaller --batch-size or --image-size.")
        return 4
    except OSError as error:
        if error.errno not in _RESOURCE_ERRORS:
            raise
        where = f"{error.filename}: " if error.filename else ""
        _print(errors, f"Error: {where}{error.strerror}. Free some space, or bring the disk back; then repeat.")
        return 4
    # The first of several processes speaks for all: torchrun counts them by RANK, and --devices, which starts them on
    # one machine, by LOCAL_RANK.
    rank = os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))
    if result is not None and hasattr(result, "__rich__") and rank == "0":
        # Piped output is for programs and files: no line of a table may be folded there.
        width = None if sys.stdout.isatty() else max(160, int(os.environ.get("COLUMNS", "0")))
        Console(width=width).print(result)
    return 0


def _unknown_key(error: UnknownOptionError) -> InputError:
    """A key of the --config file that the verb does not know; cyclopts names the nearest only for the command line."""
    key = (error.token.keyword or error.token.value).strip("[]")
    names = [name.removeprefix("--") for argument in error.argument_collection for name in argument.names]
    known = [name for name in names if name != "*" and not name.startswith(("empty-", "no-"))]
    return InputError(f"{error.token.source}: unknown key {key!r}.{nearest(key.replace('_', '-'), known)}")


def _tell(console: Console, error: ClusterMIMError) -> None:
    with contextlib.suppress(OSError):  # nobody reads: the terminal is closed, or the log's disk is full
        console.print(f"[bold red]{'Stopped' if error.exit_code == 75 else 'Error'}:[/] ", end="")
        console.print(str(error), markup=False, highlight=False)


def _tell_next(console: Console, arguments: Sequence[str], again: Mapping[str, Any] | None) -> None:
    """The whole command with which to go on, on a line of its own that can be copied."""
    if again is not None:
        started = "as it was started before, " if "RANK" in os.environ or "SLURM_PROCID" in os.environ else ""
        _print(console, f"Next: {started}{shlex.join(['clustermim', *repeated(arguments, again)])}")


def _print(console: Console, text: str) -> None:
    with contextlib.suppress(OSError):
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def repeated(arguments: Sequence[str], changes: Mapping[str, Any]) -> list[str]:
    """A command line with some of its options set anew.

    Parameters
    ----------
    arguments
        What stood behind `clustermim`.
    changes
        Options by their Python names, each with a single value; True is a flag.
    """
    words = list(arguments)
    for name, value in changes.items():
        option = f"--{name.replace('_', '-')}"
        spellings = (option, f"--{name}", f"--no-{option[2:]}")
        kept: list[str] = []
        while words:
            word = words.pop(0)
            if word.partition("=")[0] not in spellings:
                kept.append(word)
            elif "=" not in word and words and not words[0].startswith("--"):
                words.pop(0)
        words = [*kept, option, *([] if value is True else [str(value)])]
    return words


def _started_by_the_first() -> bool:
    """Whether --devices started this process: torchrun and SLURM, which watch all exit codes, count by RANK too."""
    return os.environ.get("LOCAL_RANK", "0") != "0" and "RANK" not in os.environ and "SLURM_PROCID" not in os.environ


def main() -> None:
    """Entry point of the `clustermim` command."""
    if not WAITING.keys() & os.environ.keys():
        os.environ.update(WAITING)
    keep_freed_memory()
    sys.exit(run(sys.argv[1:]))
