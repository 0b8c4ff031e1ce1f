# Sets itself up in .venv and works from there; `make help` lists the targets.
#
#   PYTHON    the Python to build .venv from (3.11 or later)
#   PIP_ARGS  further arguments of pip, such as the index that has PyTorch's CPU-only wheels
#   ARGS      further arguments of `fastdcgan demo`, `fastdcgan bench`, the gallery and pytest
#   PARTS, NO_BUILD, OUT, DRY  for gpu-check: what to run; 1 to build nothing; the folder of the results; 1 to run it on
#             a CPU with tiny shapes

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
# A process per core. A file's tests stay in one process, since they share what they build and train.
WORKERS := -n $(shell nproc 2>/dev/null || echo 2) --dist loadfile --no-loadscope-reorder

.PHONY: help install demo test test-all mutants lint bench gallery docs gpu-check clean

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
	$(PIP) --constraint $(VENV)/constraints.txt --no-deps nvidia-cutlass  # for its headers, which need none of its packages
	touch $@

$(EXTENSIONS): $(DEPENDENCIES) setup.py $(SOURCES)
	$(PIP) --no-build-isolation --no-deps --editable .
	if $(BIN)/fastdcgan doctor; then touch $@; fi

demo: $(EXTENSIONS) ## train a DCGAN on MNIST, show samples and a table: fused versus vanilla PyTorch
	$(BIN)/fastdcgan demo $(ARGS)

test: $(EXTENSIONS) ## lint and the tests that compile nothing, in a few minutes
	$(LINT)
	$(PYTEST) $(WORKERS) $(ARGS)

# The tests run every part of gpu-check; here make runs its first.
test-all: $(EXTENSIONS) ## lint and all tests, a dry run of gpu-check among them
	$(LINT)
	$(PYTEST) $(WORKERS) tests $(ARGS)
	out=$$(mktemp -d); trap 'rm -rf "$$out"' EXIT; $(MAKE) --no-print-directory gpu-check DRY=1 PARTS=doctor OUT="$$out"

mutants: $(EXTENSIONS) ## change the CUDA kernels one place at a time: how many changes do the tests notice?
	$(BIN)/python -m tests.cuda_on_cpu.mutants $(ARGS)

lint: $(EXTENSIONS) ## ruff and mypy
	$(LINT)

bench: $(EXTENSIONS) ## a table of blocks and of the training step on this machine
	$(BIN)/fastdcgan bench $(ARGS)

gallery: $(EXTENSIONS) ## pictures of what a trained DCGAN does, in docs/gallery; trains one on digits, one on emoji
	$(BIN)/python -m fastdcgan.dcgan.gallery $(ARGS)

# pdoc looks names up in the module itself, so those that __getattr__ gives are put there first.
docs: $(EXTENSIONS) ## the API reference, in docs/api
	$(BIN)/python -c 'import sys, fastdcgan, pdoc.__main__; \
	  vars(fastdcgan).update({name: getattr(fastdcgan, name) for name in fastdcgan.__all__}); \
	  pdoc.__main__.cli(sys.argv[1:])' --docformat google --no-show-source --output-directory docs/api \
	  fastdcgan fastdcgan.activations fastdcgan.dcgan \
	  $(patsubst %,fastdcgan.dcgan.%,evaluation inpainting interpolation masks style)

# Needs neither network nor .venv where $(PYTHON) has a CUDA torch: then that Python builds and runs everything.
gpu-check: export PARTS := $(PARTS)
gpu-check: export NO_BUILD := $(NO_BUILD)
gpu-check: export OUT := $(OUT)
gpu-check: export DRY := $(DRY)
gpu-check: ## everything that needs a GPU; PARTS=first and PARTS=second are what a machine lent for minutes can do
	if "$(PYTHON)" -c '$(CUDA_TORCH)' 2>/dev/null; then \
	  "$(PYTHON)" benchmarks/gpu_check.py; \
	else \
	  FASTDCGAN_BOUNDED_WAITS=1 $(MAKE) --no-print-directory install; \
	  $(BIN)/python benchmarks/gpu_check.py; \
	fi

clean: ## remove what was built, but for .venv and results
	rm -rf build dist docs/api *.egg-info fastdcgan/*.so fastdcgan/_build.json $(EXTENSIONS)
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find fastdcgan kernels benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +
