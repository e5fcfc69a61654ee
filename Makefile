# Everything sets up what it needs by itself and a second run starts at once: what is already there is known by the
# stamp files below, and a changed file in csrc/ rebuilds only what depends on it.
#
#   make demo    make test    make bench    make help
#
# Settings, on the command line or in the environment:
#   ARGS=...         passed on to the program:            make test ARGS="-k coupling -x"
#   PYTHON=python3   the interpreter to start from (3.10 or newer)
#   VENV=.venv       the virtual environment to make and use
#   SYSTEM=1         no virtual environment and no pip: use PYTHON as it is (the same as VENV= left empty)
#   TORCH=...        the PyTorch to install:              make test TORCH=torch==2.10.0
#   TORCH_INDEX=...  the package index to take PyTorch from instead of pip's own, e.g. PyTorch's index of CPU builds
#                    (pip's usual index has the much larger CUDA builds for Linux)
#   FLOWKERNELS_BUILD=0, FLOWKERNELS_CUDA=auto|0|1, MAX_JOBS=n: passed on to setup.py

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
ARGS ?=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test bench gpu lint types format clean distclean setup build peers dev FORCE

# `make gpu` takes the interpreter as it is when that one's PyTorch already sees a CUDA device.
ifneq ($(filter gpu,$(MAKECMDGOALS)),)
ifeq ($(origin SYSTEM),undefined)
SYSTEM := $(shell $(PYTHON) -c 'import torch; print("1" if torch.cuda.is_available() else "")' 2>/dev/null)
endif
endif
ifneq ($(filter-out 0,$(SYSTEM)),)
override VENV :=
endif

export PIP_DISABLE_PIP_VERSION_CHECK := 1
PIP_INSTALL = $(PY) -m pip install --quiet --progress-bar off
SOURCES := setup.py $(shell find csrc 2>/dev/null)
CPP_FILES = $$(find csrc tests/cpp tests/cuda benchmarks -name '*.h' -o -name '*.hpp' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)
BUILD_EXTENSION = $(PY) setup.py --quiet build_ext --inplace

ifeq ($(strip $(VENV)),)
# ---- an environment that is used as it is ------------------------------------------------------------------------
PY := $(PYTHON)
READY := build
PEERS :=
DEV :=
# Nothing gets installed here, so what is missing is named, in one line.
say_missing =
require = @$(PY) -c 'import $(1)' 2>/dev/null \
  || { echo "make $@: $(PY) has no $(1). Install it, or leave out SYSTEM=1." >&2; exit 1; }
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

setup:
	$(call require,torch)

# The build itself finds out what is out of date.
build: setup
ifneq ($(FLOWKERNELS_BUILD),0)
	@$(BUILD_EXTENSION)
endif

peers dev: setup
	@echo "make $@: SYSTEM=1 installs nothing; what is already there will be used."

else
# ---- an environment of our own -----------------------------------------------------------------------------------
PY := $(VENV)/bin/python
STAMPS := $(VENV)/.stamps
# The stamp carries the requirement's name, so asking for another PyTorch installs it.
TORCH_STAMP := $(STAMPS)/torch-$(subst /,-,$(subst =,-,$(subst >,-,$(subst <,-,$(firstword $(TORCH))))))
READY := $(STAMPS)/extension
PEERS := $(STAMPS)/peers
DEV := $(STAMPS)/dev
require =
CONSTRAINTS := $(STAMPS)/constraints.txt

setup: $(STAMPS)/package
build: $(READY)
peers:
	@rm -f $(PEERS)
	@$(MAKE) --no-print-directory $(PEERS)
dev: $(DEV)

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null \
	  || { echo "make: Python 3.10 or newer is needed; '$(PYTHON)' is not. Try make PYTHON=python3.11" >&2; exit 1; }
	@echo "==> making a virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV) \
	  || { echo "make: '$(PYTHON) -m venv' failed (Debian and Ubuntu keep it in the package python3-venv)" >&2; exit 1; }
	@$(PIP_INSTALL) 'setuptools>=70' wheel 'ninja>=1.11'
	@mkdir -p $(STAMPS)
	@touch $@

$(TORCH_STAMP): $(STAMPS)/venv
	@echo "==> installing $(TORCH) (a few hundred megabytes, once)"
	@$(PIP_INSTALL) $(if $(TORCH_INDEX),--index-url '$(TORCH_INDEX)') '$(TORCH)'
	@rm -f $(STAMPS)/torch-*
	@touch $@

# The package itself, editable and not yet compiled, with what demo and tests need. The installed PyTorch becomes a
# constraint for everything that follows: nothing may replace it.
$(STAMPS)/package: $(TORCH_STAMP) pyproject.toml flowkernels/_version.py
	@echo "==> installing flowkernels (editable) and what its demo and tests need"
	@$(PY) -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $(CONSTRAINTS)
	@FLOWKERNELS_BUILD=0 $(PIP_INSTALL) --constraint $(CONSTRAINTS) --no-build-isolation --editable '.[demo,test,triton]'
	@touch $@

# --force: setuptools would look at the date of the library only; ninja knows every header. The library is rebuilt as
# well when it is missing, whatever the stamp says.
$(READY): $(STAMPS)/package $(SOURCES) $(if $(wildcard flowkernels/_C*.so),,FORCE)
ifneq ($(FLOWKERNELS_BUILD),0)
	@command -v $${CXX:-c++} >/dev/null \
	  || { echo "make: no C++ compiler '$${CXX:-c++}'. Install one, or set FLOWKERNELS_BUILD=0 to go without" >&2; exit 1; }
	@echo "==> compiling the extension (minutes the first time, then only what changed)"
	@mkdir -p build
	@PATH="$(abspath $(VENV))/bin:$$PATH" $(BUILD_EXTENSION) --force > build/log.txt 2>&1 \
	  || { cat build/log.txt; exit 1; }
	@grep -A 8 'warning:' build/log.txt || true
	@touch $@
endif

# Each peer on its own when all at once does not work; one that cannot be had is named and does not stop anything.
$(PEERS): $(STAMPS)/package
	@echo "==> installing the libraries to compare with"
	@: > $@.missing
	@peers="$$($(PY) -c 'from importlib.metadata import requires as r; \
	  print(*(q.split(";")[0].replace(" ", "") for q in r("flowkernels") if "peers" in q.partition(";")[2]))')"; \
	$(PIP_INSTALL) --constraint $(CONSTRAINTS) --no-build-isolation $$peers 2>/dev/null || for peer in $$peers; do \
	  $(PIP_INSTALL) --constraint $(CONSTRAINTS) --no-build-isolation "$$peer" || echo "$$peer" >> $@.missing; \
	done
	@mv $@.missing $@

$(DEV): $(STAMPS)/package
	@echo "==> installing the tools of development"
	@FLOWKERNELS_BUILD=0 $(PIP_INSTALL) --constraint $(CONSTRAINTS) --no-build-isolation --editable '.[dev]'
	@touch $@

define say_missing
@if [ -s "$(PEERS)" ]; then \
  echo "not installed and left out of the comparison: $$(tr '\n' ' ' < $(PEERS))(make peers tries again)"; fi
endef
endif

help: ## show this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1	\2/p' Makefile | expand -t 18
	@echo "  settings: ARGS=... PYTHON=python3 VENV=.venv SYSTEM=1 TORCH=... TORCH_INDEX=... (see the top of the Makefile)"

demo: $(READY) $(PEERS) ## fit a MAF to real images, sample it fast and naively, save a picture
	$(say_missing)
	@$(PY) -m flowkernels demo $(ARGS)

# One process per core, each on one thread: most tests are too small for more. Tests of threads ask for theirs.
test: $(READY) $(PEERS) ## run the tests
	$(call require,pytest)
	$(say_missing)
	@OMP_NUM_THREADS=1 $(PY) -m pytest $(if $(VENV),--numprocesses auto --dist worksteal) $(ARGS)

bench: $(READY) $(PEERS) ## time every operator beside plain PyTorch and the peers
	$(say_missing)
	@$(PY) -m flowkernels bench --peers $(ARGS)

gpu: $(READY) $(PEERS) ## build, test and time on a CUDA device
	@[ -f benchmarks/gpu.py ] || [ -f benchmarks/gpu/__main__.py ] \
	  || { echo "make gpu: there are no GPU tests and benchmarks yet (benchmarks/gpu.py); nothing was run" >&2; exit 1; }
	@$(PY) -m benchmarks.gpu $(ARGS)

lint: $(DEV) ## check style: ruff and clang-format
	$(call require,ruff)
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@PATH="$(if $(VENV),$(abspath $(VENV))/bin:)$$PATH" clang-format --dry-run -Werror $(CPP_FILES)

types: $(DEV) ## check types: mypy, strict
	$(call require,mypy)
	@$(PY) -m mypy

format: $(DEV) ## rewrite the sources in the style that lint checks
	$(call require,ruff)
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .
	@PATH="$(if $(VENV),$(abspath $(VENV))/bin:)$$PATH" clang-format -i $(CPP_FILES)

clean: ## remove what was built; keep the virtual environment
	@rm -rf build dist *.egg-info out benchmarks/out .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	@rm -f flowkernels/_C*.so $(if $(VENV),$(STAMPS)/extension)
	@find flowkernels tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean ## remove the virtual environment too
	@if [ -f '$(VENV)/pyvenv.cfg' ]; then rm -rf '$(VENV)'; fi
