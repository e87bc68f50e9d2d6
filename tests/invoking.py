"""Command lines that must fail, or work, and what they tell: the fixtures `fails` and `works`."""

from collections.abc import Callable

import pytest

Invoke = Callable[..., str]
"""Takes a command line word by word; gives back what was told, as one line."""


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Invoke:
    """Run a command line that must end with `code`; gives back its message as one line."""
    from clustermim.cli import run

    def invoke(*arguments: object, code: int = 2) -> str:
        capsys.readouterr()
        found = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert found == code, captured.err
        assert "Traceback" not in captured.err + captured.out
        assert captured.out == ""
        message = " ".join(captured.err.replace("│", " ").split())
        assert message, "an error without a message"
        return message

    return invoke


@pytest.fixture
def works(capsys: pytest.CaptureFixture[str]) -> Invoke:
    """Run a command line that must succeed; gives back what it told on stderr and stdout as one line."""
    from clustermim.cli import run

    def invoke(*arguments: object) -> str:
        capsys.readouterr()
        found = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert found == 0, captured.err
        return " ".join((captured.err + " " + captured.out).split())

    return invoke
