# Thin names for the commands that CONTRIBUTING.md explains. `demo` and `test` set up an environment of their own and
# use a GPU where nvidia-smi finds one, else Numba's simulator.
PYTHON ?= python3
VENV ?= .venv
CUDA := $(shell nvidia-smi 2>/dev/null | sed -n 's/.*CUDA Version: *\([0-9]*\)\..*/cu\1/p')
CHOICE := $(if $(CUDA),,NUMBA_ENABLE_CUDASIM=1)

.PHONY: help demo test lint sass bench plots docs gpu wheels ci

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
	NUMBA_ENABLE_CUDASIM=1 $(PYTHON) -m pytest tests/_cuda/test_sass.py

docs:  ## a page per module under build/docs
	@# pdoc cannot resolve the generated constructors of snapshots that inherit fields: their types stay text
	NUMBA_ENABLE_CUDASIM=1 $(PYTHON) -W error -W 'ignore:Error parsing type annotation' -m pdoc -d numpy -o build/docs numbabuf \
		$(addprefix numbabuf.,buckets config demand ext.dask ext.prometheus info nvtx planning plots policies \
		report stats testing timeline tools.pipeline traces)

bench:  ## every benchmark, on whatever backend is there
	$(PYTHON) -m benchmarks all

plots:  ## pictures of the committed results, beside them
	$(PYTHON) -m benchmarks plot benchmarks/results/host.json benchmarks/results/pool.json

gpu:  ## the suite, the sanitizers and the benchmarks on a GPU, into benchmarks/results
	PYTHON=$(PYTHON) benchmarks/gpu.sh

# For a GPU machine without a network: carry the folder there, then WHEELS=build/wheels benchmarks/gpu.sh. Name in WANTED
# what is missing there, the needs of each package too; TAGS says for which Python and system.
WANTED = numba-cuda cuda-core cuda-bindings cuda-pathfinder numba llvmlite 'numpy<2.5' pytest pluggy iniconfig \
	hypothesis sortedcontainers ml_dtypes
TAGS = --python-version 3.12 --implementation cp $(foreach n,2_17 2_24 2_27 2_28 2_34,--platform manylinux_$(n)_x86_64) \
	--platform manylinux2014_x86_64
wheels:  ## wheels for a GPU machine without a network, into build/wheels; WANTED="'numpy<2.5' ..." for others
	$(PYTHON) -m pip download -q --no-deps --only-binary=:all: $(TAGS) -d build/wheels $(WANTED)

ci:  ## what CI runs
	.ci/run
