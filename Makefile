# Install, run and check SciGPT: plain pip in a virtual environment of the repository's own.
# A GPU user changes one word: make quickstart TORCH=torch
TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/installed.stamp
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check --quiet install --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help install quickstart test check mutants map clean

help:
	@echo "make quickstart   install, build shards from real data, pretrain, evaluate, register, draw the report"
	@echo "make test         install and run the test suite"
	@echo "make check        lint, format, types, docs/map.md"
	@echo "make mutants      break the product on purpose, line by line: the named tests must notice"
	@echo "make map          write docs/map.md"
	@echo "make clean        remove what the quickstart made, and caches"

install: $(STAMP)

quickstart: $(STAMP)
	$(VENV)/bin/python -m sci_launch.quickstart

test: $(STAMP)
	$(VENV)/bin/python -m pytest -q

check: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/python docs/make_map.py --check

mutants: $(STAMP)
	$(VENV)/bin/python tests/run_mutants.py

map: $(STAMP)
	$(VENV)/bin/python docs/make_map.py

clean:
	rm -rf data/quickstart runs/quickstart runs/quickstart-* runs/transfer-pretraining build .pytest_cache .ruff_cache .mypy_cache

# torch first, alone: with torch in place the second line keeps it, whatever build it is.
$(STAMP): pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@echo "installing $(TORCH)"
	@$(PIP) "$(TORCH)"
	@echo "installing sci-gpt and what it stands on (a few minutes)"
	@$(PIP) --editable ".[dev,quickstart]"
	@touch $@
