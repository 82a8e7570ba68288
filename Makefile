# Everything runs from this folder, in the environment .venv that `make setup` creates.

PYTHON ?= python3
PROCESSES ?= 2
ARGS ?=

REQUIREMENTS := requirements.txt requirements-nodeps.txt requirements-dev.txt
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := .venv/installed
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
ALONE := mpi or slurm or gpu

.PHONY: help setup train test test-fast docs lint clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP) ## Create .venv and install the requirements (PYTHON=python3), if they changed

train: $(STAMP) ## Train the default configuration (PROCESSES=2 ARGS="training.epochs=10")
	OMP_NUM_THREADS=1 $(BIN)/mpirun -n $(PROCESSES) $(BIN)/python -m app.train $(ARGS)

test: $(STAMP) ## Run the tests (ARGS="-k linalg"), two at a time where none needs the machine for itself
	@$(PYTEST) -n 2 --dist loadfile -m "not ($(ALONE))" $(ARGS); first=$$?; \
	case $$first in 0|1|5) ;; *) exit $$first ;; esac; \
	$(PYTEST) -m "$(ALONE)" $(ARGS); second=$$?; \
	case "$$first $$second" in "0 0"|"0 5"|"5 0") ;; *) exit 1 ;; esac # 5: there are none of this kind

test-fast: $(STAMP) ## Run the fast tests, two at a time; every module must be entered
	$(PYTEST) -n 2 --dist loadfile --every-module -m "not ($(ALONE) or slow)" $(ARGS)

docs: $(STAMP) ## Write the pages of the API from the docstrings, into docs/api
	OMP_NUM_THREADS=1 $(BIN)/python -m docs.make_api

lint: $(STAMP) ## Check style, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

clean: ## Remove .venv and all caches; runs/ and data/ stay
	rm -rf .venv docs/api .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find app oialr tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): $(REQUIREMENTS)
	@command -v $(PYTHON) >/dev/null || \
		{ echo "$(PYTHON): not found; install Python 3.11 or newer, or name it: make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON): Python 3.11 or newer is needed; name it: make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "$(PYTHON): venv or ensurepip is missing; on Debian install the package python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv --clear .venv
	$(PIP) install -r requirements.txt -r requirements-dev.txt
	$(PIP) install --no-deps -r requirements-nodeps.txt
	@touch $@
