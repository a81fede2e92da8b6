# The front door. Every target does its own set-up; the first call takes a few minutes, later calls none.
#   make demo       the main job on a real sentence encoder, with a page to look at
#   make test       everything a change must pass: lint, the compile tier, the default tier
#   make test-fast  the default tier alone
#   make lint       style, types, layers, spelling
#   make bench      the benchmarks
#   make clean      forget the environment and all caches

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help demo test test-fast test-compile test-backgammon lint bench clean

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --progress-bar off
WORKERS ?= 2
DEMO_FLAGS ?=
BACKGAMMON := applications/backgammon

# One thread per worker: two workers on two cores then do not fight over them.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
TYPED := --jaxtyping-packages=moefold,tests.typechecker.check
DEFAULT_TIER := not compile and not distributed and not slow and not gpu and not network

help:
	@sed -n 's/^#   //p' Makefile

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "moefold needs Python 3.11 or newer; call: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)

# A stamp stands for "installed from these two files"; either one changing installs again.
$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing moefold for the demo into $(VENV) ..."
	$(PIP) -c constraints.txt -e '.[demo]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt $(BACKGAMMON)/pyproject.toml | $(BIN)/python
	@echo "Installing moefold for development into $(VENV) ..."
	$(PIP) -c constraints.txt -e '.[dev]' -e '$(BACKGAMMON)[dev]'
	@touch $(VENV)/.demo $@

demo: $(VENV)/.demo
	$(BIN)/moefold demo $(DEMO_FLAGS)

# The default tier comes last, so that its closing line is the last thing to be read.
test: lint test-compile test-backgammon test-fast

# An application has its own settings; its tests that need gnubg say so where it is not installed.
test-backgammon: $(VENV)/.dev
	cd $(BACKGAMMON) && OMP_NUM_THREADS=1 $(abspath $(BIN))/python -m pytest -q

test-fast: $(VENV)/.dev
	$(PYTEST) -n $(WORKERS) $(TYPED) -m "$(DEFAULT_TIER)"

# Without the typing hook, which reports false errors under torch.compile (pytorch/pytorch#122093).
test-compile: $(VENV)/.dev
	$(PYTEST) -n $(WORKERS) -m compile

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/codespell

bench: $(VENV)/.dev
	set -e; for file in benchmarks/*/*.py; do $(BIN)/python $$file; done
	$(BIN)/moefold bench

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
