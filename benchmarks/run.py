"""Run every benchmark that takes minutes and needs no data but what the package embeds: `make bench`."""

import subprocess
import sys
from pathlib import Path

QUICK = ("startup.py",)

if __name__ == "__main__":
    folder = Path(__file__).parent
    failed = [name for name in QUICK if subprocess.run([sys.executable, folder / name], check=False).returncode]
    sys.exit(f"over their limits: {', '.join(failed)}" if failed else 0)
