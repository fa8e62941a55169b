# Each goal sets up .venv and builds the library when needed, and reuses them when nothing changed.
SHELL := bash
.SHELLFLAGS := -o pipefail -c
PYTHON ?= python3
TORCH ?= torch==2.13.0
ARGS ?=

PY := .venv/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
NEWS := sed -u '/already satisfied/d'
SAY := @echo '==>'
CXX_SOURCES = $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
# Folders too: their times change when files come and go.
BUILD_INPUTS := setup.py CMakeLists.txt backpack_cuda/_version.py \
  $(shell find csrc -path csrc/harness -prune -o \( -type f -o -type d \) -print)

.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo examples test bench lint build clean FORCE

help:
	@echo 'make demo      find mislabelled digits by their gradient norms (writes report.png)'
	@echo 'make examples  the demo, training with KFAC, uncertainty by Laplace, tutorials (each under a minute)'
	@echo 'make test      run the tests'
	@echo 'make bench     measure against plain PyTorch, BackPACK and Opacus (about 25 minutes)'
	@echo 'make lint      check the style of Python and C++'
	@echo 'make build     only set up .venv and build the library'
	@echo 'make clean     remove what was built; rm -r .venv removes the environment too'
	@echo
	@echo 'TORCH="torch==2.11.0"  another torch than $(TORCH)      PYTHON=python3.12  for a new .venv'
	@echo 'ARGS="-k linear -x"    passed on to the program that runs   MAX_JOBS=2     parallel compilations'
	@echo 'BACKPACK_CUDA_WITH_CUDA=OFF  and other options of the build: see setup.py'

demo: build .venv/.demo
	$(SAY) 'Running the demo'
	@$(PY) examples/find_mislabelled_digits.py $(ARGS)

examples: demo
	$(SAY) 'Training with KFAC'
	@$(PY) examples/kfac_training.py
	$(SAY) 'Laplace approximation'
	@$(PY) examples/laplace_digits.py
	$(SAY) 'Every quantity'
	@$(PY) examples/every_quantity.py
	$(SAY) 'Optimisers beyond the average gradient'
	@$(PY) examples/optimisers.py
	$(SAY) 'Several backward passes: a tangent kernel'
	@$(PY) examples/several_backward_passes.py
	$(SAY) 'Gradient of a variance'
	@$(PY) examples/gradient_of_variance.py
	$(SAY) 'A layer written by the user'
	@$(PY) examples/custom_layer.py
	$(SAY) 'A convolution and an LSTM'
	@$(PY) examples/digits_as_sequences.py

# With the demo, the peers and CUTLASS, so that no test of them is skipped. A process per core (of some 400 MB), to which
# whole files go, in the order in which conftest.py puts them.
test: build .venv/.test .venv/.demo .venv/.bench .venv/.cutlass
	$(SAY) 'Running the tests'
	@$(PY) -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder $(ARGS)

bench: build .venv/.bench
	$(SAY) 'Running the benchmarks'
	@$(PY) benchmarks/run.py $(ARGS)

lint: .venv/.lint
	$(SAY) 'Checking the style'
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/clang-format --dry-run -Werror $(CXX_SOURCES)

build: .venv/.installed

clean:
	rm -rf build dist backpack_cuda.egg-info backpack_cuda/*.so .venv/.installed

# --- The environment ---
.venv/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	  { echo 'backpack_cuda needs Python 3.10 or later as $(PYTHON): install it, or name it with PYTHON=...' >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo 'The venv module of $(PYTHON) is missing: install it (python3-venv on Debian and Ubuntu).' >&2; exit 1; }
	$(SAY) 'Creating .venv'
	@$(PYTHON) -m venv --clear .venv
	@touch $@

# Holds the torch requirement, and changes only when that does. Likewise the options of the build.
.venv/.torch-requirement: .venv/.python FORCE
	@echo '$(TORCH)' | cmp -s - $@ || echo '$(TORCH)' > $@
.venv/.options: OPTIONS = $(BACKPACK_CUDA_WITH_CUDA) $(BACKPACK_CUDA_ARCHS) $(BACKPACK_CUDA_TORCH_TARGET)
.venv/.options: .venv/.python FORCE
	@echo '$(OPTIONS)' | cmp -s - $@ || echo '$(OPTIONS)' > $@

# First and alone, and then held at that version: other packages would let pip choose a torch of their own.
.venv/.torch: .venv/.torch-requirement
	$(SAY) 'Installing $(TORCH)'
	@$(PIP) install '$(TORCH)'
	@$(PIP) freeze | grep '^torch==' > .venv/constraints.txt
	@touch $@

.venv/.build .venv/.test .venv/.demo .venv/.bench: .venv/.%: requirements/%.txt .venv/.torch
	$(SAY) 'Installing $<'
	@$(PIP) install -c .venv/constraints.txt -r $< | $(NEWS)
	@touch $@

.venv/.cutlass: requirements/cutlass.txt .venv/.python
	$(SAY) 'Installing $<'
	@$(PIP) install --no-deps -r $< | $(NEWS)
	@touch $@

.venv/.lint: requirements/lint.txt .venv/.python
	$(SAY) 'Installing $<'
	@$(PIP) install -r $< | $(NEWS)
	@touch $@

# --- The library ---
backpack_cuda/_C.so: $(BUILD_INPUTS) .venv/.build .venv/.options
	@command -v $(firstword $(CXX)) >/dev/null || \
	  { echo 'No C++ compiler: install g++ 11 or later, or name one with CXX=...' >&2; exit 1; }
	$(SAY) 'Building the library'
	@$(PY) setup.py build_ext --inplace
	@touch $@

# Editable: .venv imports the package from this folder.
.venv/.installed: setup.py .venv/.build | backpack_cuda/_C.so
	$(SAY) 'Installing backpack_cuda into .venv'
	@$(PIP) install --quiet --no-build-isolation --no-deps --use-pep517 -e .
	@touch $@
