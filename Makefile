# Sets itself up in .venv and works from there; `make help` lists the targets.
#
#   PYTHON    the Python to build .venv from (3.11 or later)
#   PIP_ARGS  further arguments of pip, such as the index that has PyTorch's CPU-only wheels
#   ARGS      further arguments of `fastdcgan demo`, `fastdcgan bench`, the gallery and pytest
#   OUT, DRY  for gpu-check: the folder of the results; 1 to run it on a CPU with tiny shapes

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.SUFFIXES:
.DEFAULT_GOAL := help

NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
CUDA_TORCH := import sys, torch; sys.exit(torch.version.cuda is None)
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	"$$p" -c '$(NEW_ENOUGH)' 2>/dev/null && echo "$$p" && break; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --disable-pip-version-check $(PIP_ARGS)
DEPENDENCIES := $(VENV)/.dependencies
EXTENSIONS := $(VENV)/.extensions
SOURCES := $(shell find csrc -type f)
LINT := $(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
# What compiles for minutes, beside all the rest on a second core: the CUDA build, kernels as plain programs.
COMPILING := tests/csrc/cuda/test_build.py $(patsubst %,tests/csrc/cpu/test_%.py,amx halves sanitizers) \
	$(patsubst %,tests/cuda_on_cpu/test_%.py,contractions conventions mutants shim warpgroups)
# The tests of whatever backend, for backend("cuda") on CPU tensors
CUDA_ON_CPU := tests/dispatch/test_primitives.py $(patsubst %,tests/engine/test_%.py,autograd double_backward running_stats saved_memory)

.PHONY: help install demo test mutants lint bench gallery docs gpu-check clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 12

install: $(EXTENSIONS) ## make .venv with everything pinned, build the extensions

# Pinned by constraints.txt. On a machine with a GPU whose Python has a CUDA torch, that one is used as it is.
$(DEPENDENCIES): constraints.txt pyproject.toml
	@if ! "$(PYTHON)" -c '$(NEW_ENOUGH)'; then \
	  echo "fastdcgan needs Python 3.11 or later, found: '$(PYTHON)'. Install it, or name it: make PYTHON=python3.11" >&2; \
	  exit 1; \
	fi
	if nvidia-smi >/dev/null 2>&1 && "$(PYTHON)" -c '$(CUDA_TORCH)' 2>/dev/null; then \
	  "$(PYTHON)" -m venv --system-site-packages $(VENV); \
	  grep -v -E '^(torch|triton)==' constraints.txt >$(VENV)/constraints.txt; \
	else \
	  "$(PYTHON)" -m venv $(VENV); \
	  cp constraints.txt $(VENV)/constraints.txt; \
	fi
	$(BIN)/python -c 'import itertools, tomllib; \
	  project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	  extras = itertools.chain(*project["optional-dependencies"].values()); \
	  print(*project["dependencies"], *(x for x in extras if not x.startswith("fastdcgan")), sep="\n")' >$(VENV)/requirements.txt
	$(PIP) --constraint $(VENV)/constraints.txt --requirement $(VENV)/requirements.txt
	touch $@

$(EXTENSIONS): $(DEPENDENCIES) setup.py $(SOURCES)
	$(PIP) --no-build-isolation --no-deps --editable .
	if $(BIN)/fastdcgan doctor; then touch $@; fi

demo: $(EXTENSIONS) ## train a DCGAN on MNIST, show samples and a table: fused versus vanilla PyTorch
	$(BIN)/fastdcgan demo $(ARGS)

test: $(EXTENSIONS) ## lint and the tests
	mkdir -p build
	$(PYTEST) $(COMPILING) $(ARGS) >build/test-compiling.log 2>&1 & beside=$$!; \
	trap 'kill $$beside 2>/dev/null || true' EXIT; \
	$(LINT) || exit 1; \
	$(PYTEST) tests --ignore-glob "tests/kernels/test_*" $(COMPILING:%=--ignore %) $(ARGS) || failed=1; \
	TRITON_INTERPRET=1 $(PYTEST) tests/kernels/test_*.py $(ARGS) || failed=1; \
	if command -v g++ >/dev/null; then \
	  FASTDCGAN_TEST_CUDA_ON_CPU=1 $(PYTEST) $(CUDA_ON_CPU) -k "cuda- and not opcheck" $(ARGS) || failed=1; \
	else \
	  echo "no g++ here: the CUDA backend is not tested on CPU tensors"; \
	fi; \
	echo "Waiting for the tests that compile ..."; \
	wait $$beside || failed=1; \
	cat build/test-compiling.log; \
	exit $${failed:-0}

mutants: $(EXTENSIONS) ## change the CUDA kernels one place at a time: how many changes do the tests notice?
	$(BIN)/python -m tests.cuda_on_cpu.mutants $(ARGS)

lint: $(EXTENSIONS) ## ruff and mypy
	$(LINT)

bench: $(EXTENSIONS) ## a table of blocks and of the training step on this machine
	$(BIN)/fastdcgan bench $(ARGS)

gallery: $(EXTENSIONS) ## pictures of what a trained DCGAN does, in docs/gallery; trains one on digits, one on photographs
	$(BIN)/python -m fastdcgan.dcgan.gallery $(ARGS)

# pdoc looks names up in the module itself, so those that __getattr__ gives are put there first.
docs: $(EXTENSIONS) ## the API reference, in docs/api
	$(BIN)/python -c 'import sys, fastdcgan, pdoc.__main__; \
	  vars(fastdcgan).update({name: getattr(fastdcgan, name) for name in fastdcgan.__all__}); \
	  pdoc.__main__.cli(sys.argv[1:])' --docformat google --no-show-source --output-directory docs/api \
	  fastdcgan fastdcgan.activations fastdcgan.dcgan \
	  $(patsubst %,fastdcgan.dcgan.%,evaluation inpainting interpolation masks style)

# Needs neither network nor .venv where $(PYTHON) has a CUDA torch: then that Python builds and runs everything.
gpu-check: export OUT := $(OUT)
gpu-check: export DRY := $(DRY)
gpu-check: ## everything that needs a GPU, in under 8 minutes: build, tests, sanitizer, timings
	if "$(PYTHON)" -c '$(CUDA_TORCH)' 2>/dev/null; then \
	  "$(PYTHON)" benchmarks/gpu_check.py; \
	else \
	  $(MAKE) --no-print-directory install; \
	  $(BIN)/python benchmarks/gpu_check.py; \
	fi

clean: ## remove what was built, but for .venv and results
	rm -rf build dist docs/api *.egg-info fastdcgan/*.so fastdcgan/_build.json $(EXTENSIONS)
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find fastdcgan kernels benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +
