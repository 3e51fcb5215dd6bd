# `make` alone lists the targets. Every target makes what it needs; nothing is installed outside $(VENV).

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# Small tensors: a second thread per process only competes with the second test worker.
export OMP_NUM_THREADS ?= 1
WORKERS ?= 2
TYPED := lightning_gradguard $(wildcard examples benchmarks)

.PHONY: help
help: ## Show this list
	@awk 'BEGIN { FS = ":.*## " } /^[a-z-]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# pip is upgraded first because older ones know neither --group (25.1) nor --build-constraint (25.3).
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt \
		--build-constraint constraints.txt --group dev --editable '.[all]'
	@touch $@

.PHONY: install
install: $(INSTALLED) ## Make .venv with the pinned versions (every other target does this when needed)

.PHONY: demo
demo: $(INSTALLED) ## Train real nets on handwritten digits, with and without the guard
	$(BIN)/python examples/digits.py

.PHONY: test
test: $(INSTALLED) ## Run the tests and the docstring examples
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.PHONY: lint
lint: $(INSTALLED) ## Check style, formatting and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

.PHONY: types
types: $(INSTALLED) ## Check types (mypy --strict)
	$(BIN)/mypy $(TYPED)

.PHONY: bench
bench: $(INSTALLED) ## Measure what the guard costs per step
	$(BIN)/python -m benchmarks overhead

.PHONY: wheel
wheel: $(INSTALLED) ## Build the wheel and try it in an empty environment outside the checkout
	$(BIN)/python tests/smoke/build_and_try.py

.PHONY: format
format: $(INSTALLED) ## Apply formatting and the safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: clean
clean: ## Remove .venv, caches and build outputs
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis

# The tests come last, so that the output ends with their summary.
.PHONY: ci
ci: lint types wheel test ## Everything above that must hold before a change lands
