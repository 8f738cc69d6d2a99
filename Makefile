# Everything a developer or a user runs. Needs python 3.11 or newer with pip, and make; nothing else.
PYTHON ?= python3
TORCH_INDEX ?=
MINUTES ?=
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
TORCH := $(shell sed -n '/^torch==/p' constraints.txt)
PACKAGE := $(VENV)/.package-ready
TOOLS := $(VENV)/.tools-ready
CODE := src tests benchmarks examples
# pytest exits with 5 when no test was selected, which is no failure.
OR_NONE := || [ $$? -eq 5 ]

.DEFAULT_GOAL := help
.PHONY: help setup demo check lint test test-slow fix bench clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  TORCH_INDEX=URL  where torch comes from (on Linux without a GPU, PyTorch's CPU index is far smaller)"
	@echo "  MINUTES=N        fit the demo's training into about N minutes on this machine"
	@echo "  PYTHON=python3   the interpreter that $(VENV) is made with     JOBS=2   processes that run tests"

setup: $(TOOLS) ## make .venv with the package and the developer's tools

demo: $(PACKAGE) ## set up, train a small text-to-image model on the CPU, score it, write runs/demo/report.html
	$(BIN)/shoestring demo $(if $(MINUTES),--minutes $(MINUTES))

check: lint ## format, lint, types, architecture and fast tests: about two minutes
	$(BIN)/pytest -q -n $(JOBS) -m "not slow and not network" $(OR_NONE)

lint: $(TOOLS) ## format, lint and types alone
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/mypy

test: $(TOOLS) ## the whole test suite but for the slow tests, then lint
	$(BIN)/pytest -n $(JOBS) -m "not slow and not network" $(OR_NONE)
	$(MAKE) lint

test-slow: $(TOOLS) ## the slow tests
	$(BIN)/pytest --durations 10 -m "slow and not network" $(OR_NONE)

fix: $(TOOLS) ## format, and mend what the linter can mend
	$(BIN)/ruff format $(CODE)
	$(BIN)/ruff check --fix $(CODE)

bench: $(TOOLS) ## run every benchmark, tiny: one JSON line a figure
	@set -e; for script in benchmarks/*.py; do echo "# $$script" >&2; $(BIN)/python $$script --tiny; done

clean: ## remove caches and build leftovers; leaves .venv, stores and runs
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache
	find src tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +

# The package alone, for `make demo`: torch first and by itself, since its index may hold nothing else.
$(PACKAGE): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, not %s. Name one: make PYTHON=python3.12" % sys.version.split()[0])'
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	$(PIP) install -q $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(PIP) install -q -c constraints.txt -e .
	@touch $@

$(TOOLS): $(PACKAGE)
	$(PIP) install -q -c constraints.txt -e '.[dev]'
	@touch $@
