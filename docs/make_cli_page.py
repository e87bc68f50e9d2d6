"""Write docs/cli.md: the help of every verb, made from the same signatures and docstrings as --help."""

from pathlib import Path

from clustermim.cli import build_app

PAGE = Path(__file__).parent / "cli.md"
HEADER = "<!-- Made by `make docs` from the verbs' signatures and docstrings; do not edit. -->\n\n"

if __name__ == "__main__":
    PAGE.write_text(HEADER + build_app().generate_docs(output_format="markdown", recursive=True))
    print(PAGE)
