# Thin names for the commands that CONTRIBUTING.md explains. `demo` and `test` set up an environment of their own and
# use a GPU where nvidia-smi finds one, else Numba's simulator.
PYTHON ?= python3
VENV ?= .venv
CUDA := $(shell nvidia-smi 2>/dev/null | sed -n 's/.*CUDA Version: *\([0-9]*\)\..*/cu\1/p')
CHOICE := $(if $(CUDA),,NUMBA_ENABLE_CUDASIM=1)

.PHONY: help demo test lint sass bench docs gpu ci

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1  /p' Makefile | expand -t 16

$(VENV)/ready: setup.cfg
	[ -e $(VENV)/bin/python ] || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q -e '.[test$(if $(CUDA),$(comma)$(CUDA))]'
	touch $@

comma := ,

demo: $(VENV)/ready  ## the main job: a generated load through graphs, every step checked
	$(VENV)/bin/python -m numbabuf replay

test: $(VENV)/ready  ## the whole suite
	$(CHOICE) $(VENV)/bin/python -m pytest

lint:  ## ruff and mypy
	ruff check
	mypy

sass:  ## every kernel to machine code for each architecture: no GPU needed
	NUMBA_ENABLE_CUDASIM=1 $(PYTHON) -m pytest tests/test_sass.py

bench:  ## every benchmark, on whatever backend is there
	$(PYTHON) -m benchmarks all

gpu:  ## the suite on a GPU, then every benchmark
	$(PYTHON) -m pytest --require-gpu
	$(PYTHON) -m benchmarks all

ci:  ## what CI runs
	.ci/run
