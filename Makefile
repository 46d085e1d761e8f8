# Two commands are all there is from a clean clone:  make demo  and  make test.
# They need make and Python >= 3.11 with venv (Debian: python3-venv); another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install -c constraints.txt -e
# Stamps: an installation is repeated only when what it depends on has changed.
EXAMPLES := $(VENV)/examples.stamp
DEV := $(VENV)/dev.stamp

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL: # the checks run in the order they are listed: cheap ones first
.PHONY: help demo test install check docs tests quick variations benchmarks clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(EXAMPLES) ## install, then correct noisy labels on a small embedded data set: a table and a picture
	$(BIN)/python -m examples.noisy_labels.demo

test: check docs tests ## install, then run everything: linter, formatter, types, documentation, tests

install: $(DEV) ## install for development, into .venv

check: $(DEV) ## linter, formatter and type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(DEV) ## build the documentation anew, warnings are errors
	$(BIN)/python -m sphinx -q -E -W --keep-going docs docs/_build

tests: $(DEV) ## run the tests, with every example in docstrings, README and docs
	$(BIN)/python -m pytest -m "not slow and not gpu"

quick: $(DEV) ## run the tests that need neither installations nor whole programs: about three minutes on two cores
	$(BIN)/python -m pytest

variations: $(DEV) ## run the tests again as on other processors: simpler kernels, one thread and two
	$(BIN)/python tests/variations.py

benchmarks: $(EXAMPLES) ## time steps and hypergradients against the same mathematics written by hand
	$(BIN)/python -m benchmarks.step_time
	$(BIN)/python -m benchmarks.hypergradient

clean: ## remove the environment and everything that was built
	rm -rf $(VENV) docs/_build build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Said before anything is made: a half-made environment would be taken for a whole one the next time.
QUALIFIES = import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))
UNFIT = make needs Python 3.11 or newer with its venv module, and "$(PYTHON)" is not one. Name another interpreter \
(make test PYTHON=python3.12), or on Debian and Ubuntu: apt-get install python3-venv

$(BIN)/python:
	$(if $(shell $(PYTHON) -c '$(QUALIFIES)' >&2 && echo yes),,$(error $(UNFIT)))$(PYTHON) -m venv $(VENV)

$(EXAMPLES): pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) ".[examples]"
	@touch $@

$(DEV): pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) ".[dev]"
	@touch $(EXAMPLES) $@ # dev contains examples
