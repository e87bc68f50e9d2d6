import subprocess
import sys
import time


def test_help_does_not_import_torch() -> None:
    script = (
        "import sys\nfrom clustermim.cli import run\nassert run(['--help']) == 0\n"
        "import clustermim\nassert 'torch' not in sys.modules and 'numpy' not in sys.modules, 'heavy import'"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "pretrain" in done.stdout and "tokenizer" in done.stdout
    # The benchmark holds it to 0.5 s on a quiet machine; here only a regression of kind shall fail.
    assert time.perf_counter() - start < 5


def test_version() -> None:
    import clustermim

    done = subprocess.run([sys.executable, "-m", "clustermim", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == clustermim.__version__
