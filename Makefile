# make train   a virtual environment, everything installed, the demo trained (8 to 12 minutes on two cores)
# make test    the same environment, then lint, type check and tests
# make docs    a reference of the Python packages, made from their docstrings, in build/api; docs/configuration.md;
#              the table of docs/scaling.md
#
# All can be repeated: what is installed is not installed again. On a machine with NVIDIA GPUs: make TORCH='torch>=2.10,<2.14' ...

PYTHON ?= python3
VENV   ?= .venv
# On Linux this version's wheel for the CPU is taken where pip finds one; any version from 2.10 to 2.13 will do.
TORCH  ?= torch==2.13.0
CONFIG ?= configs/moda_demo.yaml
# Further key=value overrides for the run.
ARGS   ?=

BIN := $(VENV)/bin

.PHONY: train test install lint types check docs clean

train: $(VENV)/.installed
	$(BIN)/moda train $(CONFIG) $(ARGS)

test: $(VENV)/.installed-dev lint types check

install: $(VENV)/.installed

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

check: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "not gpu" -n auto --dist worksteal

docs: $(VENV)/.installed-dev
	$(BIN)/pdoc --docformat restructuredtext --output-directory build/api moda_kernels moda moda_evals
	$(BIN)/python -m moda.config.reference > docs/configuration.md
	$(BIN)/python -m moda.bench.projection docs/scaling.md

$(BIN)/python:
	$(PYTHON) -c 'import sys; assert (3, 10) <= sys.version_info[:2] <= (3, 13), "Python 3.10 to 3.13 is needed"'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	@echo 'installing into $(VENV): one to three minutes'
	$(BIN)/pip install -qq --disable-pip-version-check '$(TORCH)'
	$(BIN)/pip install -qq --disable-pip-version-check --editable '.[report]'
	@echo 'installed. In this and every new shell: source $(BIN)/activate'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install -qq --disable-pip-version-check --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build runs data/work
