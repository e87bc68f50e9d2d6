# `make demo` and `make test` set everything up by themselves: Python 3.11, pip and make are all they need.
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help demo test slow lint bench docs clean

help:  ## what can be made
	@grep -E '^[a-z]+:.*##' Makefile | sed 's/:.*##/\t/'

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "clustermim needs Python 3.11 or newer; run e.g. make PYTHON=python3.11 " + "demo")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: $(READY)  ## the main job on embedded images, about two minutes; ends with the path of report.html
	rm -rf demo
	$(BIN)/clustermim demo --out demo

test: $(READY)  ## all tests but the slow ones
	$(BIN)/python -m pytest -n 2

slow: $(READY)  ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

lint: $(READY)  ## ruff, mypy --strict, import directions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY)  ## what the benchmarks folder measures in minutes; prints commands and figures
	$(BIN)/python benchmarks/run.py

docs: $(READY)  ## help of every verb as docs/cli.md
	$(BIN)/python docs/make_cli_page.py

clean:  ## everything that make made
	rm -rf $(VENV) build dist demo src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
