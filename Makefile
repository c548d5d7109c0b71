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

docs:  ## a page per module under build/docs
	@# pdoc cannot resolve the generated constructors of snapshots that inherit fields: their types stay text
	NUMBA_ENABLE_CUDASIM=1 $(PYTHON) -W error -W 'ignore:Error parsing type annotation' -m pdoc -d numpy -o build/docs numbabuf \
		$(addprefix numbabuf.,buckets calibration config demand ext.dask ext.prometheus hierarchy html info nvtx \
		pipeline planning plots policies report stats testing timeline traces)

bench:  ## every benchmark, on whatever backend is there
	$(PYTHON) -m benchmarks all

gpu:  ## the suite, the sanitizers and every benchmark on a GPU, into benchmarks/results
	PYTHON=$(PYTHON) benchmarks/gpu.sh

ci:  ## what CI runs
	.ci/run
