# Everything runs in .venv, which is made on first use and brought up to date when pyproject.toml
# changes. PYTHON=/path/to/python picks the interpreter; another version than .venv's rebuilds it.
# Only the CUDA compiler, which is large, has an environment of its own, .venv-cuda.

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)
VERSION_OF = -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])'
VERSION := $(shell $(PYTHON) $(VERSION_OF))
PACKAGE := $(VENV)/package-$(VERSION)
TESTS := $(VENV)/tests-$(VERSION)
CUDA := .venv-cuda
CUDA_TESTS := $(CUDA)/tests-$(VERSION)
# The tests of a file share their runs, so they stay in one process.
PYTEST := JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: quickstart test test-slow test-cuda lint format

quickstart: $(PACKAGE)
	$(BIN)/python tools/quickstart.py

test: $(TESTS)
	$(PYTEST) -m "not slow"

test-slow: $(TESTS)
	$(PYTEST) -m slow

test-cuda: $(CUDA_TESTS)
	JAX_PLATFORMS=cpu $(CUDA)/bin/python -m pytest tests/cuda

lint: $(TESTS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(TESTS)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(PACKAGE): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else 1)' || \
	  { echo "$(PYTHON) is not Python 3.11 or newer; name one: PYTHON=/path/to/python make"; exit 1; }
	@test "`$(BIN)/python $(VERSION_OF) 2>/dev/null`" = "$(VERSION)" || \
	  $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

# torch comes first and alone: resolved beside others, another build of it may be picked.
$(TESTS): pyproject.toml $(PACKAGE)
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@

$(CUDA_TESTS): pyproject.toml
	@test "`$(CUDA)/bin/python $(VERSION_OF) 2>/dev/null`" = "$(VERSION)" || \
	  $(PYTHON) -m venv --clear $(CUDA)
	$(CUDA)/bin/python -m pip install --quiet --editable '.[test-cuda]'
	@touch $@
