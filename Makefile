# The two commands a newcomer needs: `make demo` and `make test`. Both set up .venv first, once.
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
# torchrec's metadata asks for the CUDA build of FBGEMM, which cannot stand beside fbgemm-gpu-cpu: pyproject's `train`
# extra holds torchrec's real needs, and torchrec comes after them without its own list.
TORCHREC := torchrec==1.8.0

.PHONY: help venv demo test test-slow check bench clean

help:  ## what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

venv: $(VENV)/.installed  ## set up .venv: the library, its C++ kernels, and all that training, serving and tests use

$(VENV)/.installed: pyproject.toml Makefile $(wildcard dpq_rec/kernels/*.cpp dpq_rec/kernels/*.h dpq_rec/kernels/CMakeLists.txt)
	@command -v c++ >/dev/null || { echo "make: a C++17 compiler is missing; install one: apt-get install g++ (Debian, Ubuntu), dnf install gcc-c++ (Fedora), xcode-select --install (macOS)"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: Python 3.11 or newer is needed, got: $$($(PYTHON) --version); name one: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[train,serve,export,dev]'
	$(BIN)/python -m pip install --quiet --no-deps $(TORCHREC)
	@touch $@

demo: venv  ## train on two ranks, freeze, verify, serve, look up, export: the whole path on data it generates
	PYTHONPATH=. $(BIN)/python deploy/demo.py

test: venv  ## the suite, under 8 minutes: two processes, each file of tests in one of them
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile $(ARGS)

test-slow: venv  ## what takes longer
	$(BIN)/python -m pytest -m slow $(ARGS)

check: venv  ## ruff, ruff format, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: venv  ## decoding beside torch.index_select and FBGEMM; lookups, as their caller pays for them
	$(BIN)/python -m tests.benchmarks.library decode
	$(BIN)/python -m tests.benchmarks.library lookup

clean:  ## remove what make made
	rm -rf $(VENV) build dist demo-run .pytest_cache .mypy_cache .ruff_cache .hypothesis
