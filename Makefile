# Everything here works on a fresh machine that has Python 3.11 or newer and pip; `make help` lists it.
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
# lm-eval needs these, which come as source only.
INSTALL := install --only-binary :all: --no-binary sqlitedict,rouge-score,word2number
CPU_ONLY := not gpu and not multigpu
# One thread to each test worker: tiny models are slower on many.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help install demo check test test-fast test-slow format format-check lint types imports constraints clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1\t\2/' | expand -t 16

install: $(VENV)/installed ## make .venv with the pinned versions

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than Python 3.11: make PYTHON=python3.12 …" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade --constraint constraints.txt pip
	$(PIP) $(INSTALL) --constraint constraints.txt torch hatchling editables setuptools
	$(PIP) $(INSTALL) --constraint constraints.txt --no-build-isolation --editable . --group dev
	touch $@

demo: install ## train a small teacher, distil it, compare; options: make demo ARGS="--seed 1"
	$(BIN)/limbeck demo $(ARGS)

check: format-check lint types imports test-fast ## the quick gate: format, lint, types, arrows between rooms, fast tests

test: test-fast test-slow ## every test that a CPU can run

test-fast: install ## the tests that take seconds
	$(PYTEST) -m "not slow and $(CPU_ONLY)" $(ARGS)

test-slow: install ## the tests that take longer
	$(PYTEST) -m "slow and $(CPU_ONLY)" $(ARGS)

format: install ## rewrite the code in the house's format
	$(BIN)/ruff check --quiet --fix-only .
	$(BIN)/ruff format .

format-check: install
	$(BIN)/ruff format --check .

lint: install ## look for mistakes in the code
	$(BIN)/ruff check .

types: install ## check the types
	$(BIN)/pyright --pythonpath $(BIN)/python

imports: install ## check the arrows between the rooms
	$(BIN)/lint-imports --no-cache

constraints: ## pin anew: the newest of all that pyproject.toml allows, torch as it is
	rm -rf build/pins && $(PYTHON) -m venv build/pins
	build/pins/bin/python -m pip install --quiet --upgrade pip
	build/pins/bin/python -m pip $(INSTALL) $$(grep '^torch==' constraints.txt) hatchling editables setuptools
	build/pins/bin/python -m pip $(INSTALL) --no-build-isolation --editable . --group dev
	grep '^#' constraints.txt > build/constraints.txt
	build/pins/bin/python -m pip freeze --all --exclude-editable | sed -E 's/^(torch==[0-9.]+)\+.*/\1/' \
		>> build/constraints.txt
	mv build/constraints.txt constraints.txt

clean: ## remove the virtual environment and all caches
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
