# Everything runs in .venv, which is made on first use and brought up to date when pyproject.toml
# or constraints.txt changes. PYTHON=/path/to/python picks the interpreter; another version than
# .venv's rebuilds it. The versions are those of constraints.txt, which the tests ran with; PINS=none
# takes the newest that pyproject.toml allows, in .venv-newest. EXTRAS=tpu, cuda or cuda12 adds what
# that hardware needs. The CUDA compiler, which is large, has an environment of its own, .venv-cuda;
# so have the trackers, which want older libraries than the pinned ones, .venv-trackers.

PINS ?= constraints.txt
ifeq ($(PINS),none)
VENV := .venv-newest
PIP_INSTALL := -m pip install --upgrade --upgrade-strategy eager
PINNED := always
else
VENV := .venv
PIP_INSTALL := -m pip install --constraint $(PINS)
PINNED := $(PINS)
endif
BIN := $(VENV)/bin
PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)
VERSION_OF = -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])'
VERSION := $(shell $(PYTHON) $(VERSION_OF))
PACKAGE := $(VENV)/package-$(VERSION)$(if $(EXTRAS),-$(EXTRAS))
TESTS := $(VENV)/tests-$(VERSION)
CUDA := .venv-cuda
CUDA_TESTS := $(CUDA)/tests-$(VERSION)
TRACKERS := .venv-trackers
TRACKERS_TESTS := $(TRACKERS)/tests-$(VERSION)
# The tests of a file share their runs, so they stay in one process.
PYTEST := JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: quickstart walk test test-slow test-cuda test-trackers lint format newest update always

# The newest CUDA that the driver of a GPU serves, by its own words; nothing where there is no GPU.
DRIVER_CUDA = $(shell nvidia-smi 2>/dev/null | sed -n 's/.*CUDA Version: *\([0-9]*\).*/\1/p')
CUDA_EXTRA = $(if $(filter 12,$(DRIVER_CUDA)),cuda12,cuda)
TPU_DEVICE := $(firstword $(wildcard /dev/accel0 /dev/vfio/0))

# A GPU or TPU that is here, and for which nothing is installed, is named.
quickstart: $(PACKAGE)
	@test -n "$(EXTRAS)$(wildcard $(VENV)/package-$(VERSION)-*)" || \
	  test -z "$(DRIVER_CUDA)" || \
	  echo "an NVIDIA GPU is here, and not used: EXTRAS=$(CUDA_EXTRA) make quickstart"
	@test -n "$(EXTRAS)$(wildcard $(VENV)/package-$(VERSION)-*)" || \
	  test -z "$(TPU_DEVICE)" || \
	  echo "a TPU is here, and not used: EXTRAS=tpu make quickstart"
	$(BIN)/python tools/quickstart.py

# Both READMEs, as a reader goes through them, in a clone of the last commit; takes many minutes.
walk:
	$(PYTHON) tools/walk.py

test: $(TESTS)
	$(PYTEST) -m "not slow"

test-slow: $(TESTS)
	$(PYTEST) -m slow

test-cuda: $(CUDA_TESTS)
	JAX_PLATFORMS=cpu $(CUDA)/bin/python -m pytest tests/cuda

test-trackers: $(TRACKERS_TESTS)
	JAX_PLATFORMS=cpu $(TRACKERS)/bin/python -m pytest tests/training/test_reporters.py \
	  tests/weights/test_modelscope_hub.py

lint: $(TESTS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(TESTS)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# What the newest versions do, where any is newer than the pinned one.
newest:
	@$(MAKE) PINS=none PYTHON=$(PYTHON) .venv-newest/tests-$(VERSION)
	@.venv-newest/bin/python tools/pin_versions.py constraints.txt --check || \
	  $(MAKE) PINS=none PYTHON=$(PYTHON) test

# Pins the newest versions for this Python, if every test passes with them.
update:
	$(MAKE) PINS=none PYTHON=$(PYTHON) test
	$(MAKE) PINS=none PYTHON=$(PYTHON) test-slow
	$(MAKE) PINS=none PYTHON=$(PYTHON) lint
	.venv-newest/bin/python tools/pin_versions.py constraints.txt

$(PACKAGE): pyproject.toml $(PINNED)
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else 1)' || \
	  { echo "$(PYTHON) is not Python 3.11 or newer; name one: PYTHON=/path/to/python make"; exit 1; }
	@test "`$(BIN)/python $(VERSION_OF) 2>/dev/null`" = "$(VERSION)" || \
	  $(PYTHON) -m venv --clear $(VENV)
	@echo "installing dsjax into $(VENV): a few minutes the first time"
	$(BIN)/python $(PIP_INSTALL) --editable '.$(if $(EXTRAS),[$(EXTRAS)])'
	@touch $@

$(TRACKERS_TESTS): pyproject.toml
	@test "`$(TRACKERS)/bin/python $(VERSION_OF) 2>/dev/null`" = "$(VERSION)" || \
	  $(PYTHON) -m venv --clear $(TRACKERS)
	$(TRACKERS)/bin/python -m pip install --quiet --editable '.[test-trackers]'
	@touch $@

# torch comes first and alone: resolved beside others, another build of it may be picked.
$(TESTS): pyproject.toml $(PACKAGE)
	$(BIN)/python $(PIP_INSTALL) torch==2.13.0
	$(BIN)/python $(PIP_INSTALL) --editable '.[test]'
	@touch $@

$(CUDA_TESTS): pyproject.toml constraints.txt
	@test "`$(CUDA)/bin/python $(VERSION_OF) 2>/dev/null`" = "$(VERSION)" || \
	  $(PYTHON) -m venv --clear $(CUDA)
	$(CUDA)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[test-cuda]'
	@touch $@
