"""Shared by all tests: shapes and types are checked at run time here, and only here."""

import os
import signal

# pytest-xdist runs a process on each core, so each takes one thread and none spins.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from beartype import BeartypeConf, beartype
from hypothesis import settings
from jaxtyping import install_import_hook

# In CI the same examples each time: there a failure must speak of the change. At home hypothesis goes on looking.
# Nowhere a limit of time: on a busy machine it would speak of the machine.
settings.register_profile("ci", derandomize=True, deadline=None)
settings.register_profile("home", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "home")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Torch starts with another seed in each process; a test that draws without a generator must not fail by chance."""
    torch.manual_seed(0)


def checked(thing):  # type: ignore[no-untyped-def]
    """Beartype with the numeric tower: an int is welcome where a float is asked for."""
    return beartype(conf=BeartypeConf(is_pep484_tower=True))(thing)


install_import_hook("clustermim", "conftest.checked")

pytest_plugins = ["invoking"]

# A shell without job control lets what it starts in the background ignore interrupts; some tests send them.
signal.signal(signal.SIGINT, signal.default_int_handler)
