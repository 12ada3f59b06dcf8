# Two commands do everything on a machine with Python >= 3.11, git and make: `make run` and `make test`.
# Each sets up .venv when it is missing, when pyproject.toml or constraints.txt changed, or when the folder was moved.

PRESET ?= smoke
DATA   ?=
ARGS   ?=
README := README.md
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

# The pins in constraints.txt are tested on 3.11, so that one is tried first.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3 python; do \
	$$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$python && break; done)

ifneq ($(DATA),)
export ITERA_LITE_DATA := $(abspath $(DATA))
endif

# A virtual environment holds absolute paths: in a folder that was moved or copied it has to be made again.
ifneq ($(shell cat $(READY) 2>/dev/null),$(CURDIR))
.PHONY: $(READY)
endif

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup run test test-slow lint tests notebooks export clean-notebooks readme bench site lab hooks

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' Makefile

setup: $(READY)  ## make .venv and install the project with its exact pins

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "make: no Python >= 3.11 with venv found; install one (Debian, Ubuntu: apt-get install python3 python3-venv), or name it: make PYTHON=path" >&2; exit 1; }
	@echo "Setting up $(VENV) with $(PYTHON) (the first time this takes some minutes: torch is large)"
	@if [ -f $(READY) ] && [ "$$(cat $(READY))" != "$(CURDIR)" ]; then $(PYTHON) -m venv --clear $(VENV); \
	elif ! $(BIN)/python -m pip --version >/dev/null 2>&1; then $(PYTHON) -m venv --clear $(VENV); fi
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt setuptools wheel
	@PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev,bench,peers,figures,hf,jobs]'
	@echo "$(CURDIR)" > $(READY)

run: $(READY)  ## train, compress, measure and report: PRESET=smoke|laptop|gpu DATA=folder with the corpora
	@$(BIN)/python -m itera_lite.app.cli run --preset $(PRESET) $(ARGS)

test: lint tests notebooks  ## every check (not the slow ones)
	@echo "All checks passed."

test-slow: $(READY)  ## the checks that take long: a hundred kills, a full install of the wheel
	@$(BIN)/python -m pytest -m slow

lint: $(READY)
	@$(BIN)/ruff check .

# Library and README in sync with the notebooks are tests too: tests/test_house.py
tests: $(READY)
	@$(BIN)/python -m pytest -m 'not slow' --durations=10

# Two notebooks at a time with one thread each: more threads than cores would only wait for each other.
notebooks: $(READY)
	@OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2

export: $(READY)  ## write the library from the notebooks
	@$(BIN)/nbdev_export

clean-notebooks: $(READY)  ## take outputs and stray metadata out of nbs/
	@$(BIN)/nbdev_clean

# The notebook is executed, so that its table comes from the records of this moment; its code cells tagged hide_input are left out.
readme: $(READY)  ## write README.md from nbs/index.ipynb, and the tables, lists and picture beside it
	@$(BIN)/python -m nbconvert --log-level=ERROR --to=markdown --execute --TagRemovePreprocessor.enabled=True \
		--TagRemovePreprocessor.remove_input_tags=hide_input --output='$(abspath $(README))' nbs/index.ipynb
	@$(if $(filter README.md,$(README)),$(BIN)/python -c 'from itera_lite.reports.front_page import write_generated; write_generated()')

bench: $(READY)  ## measure against the peers: tokens per second, same shapes, one process
	@$(BIN)/python -m itera_lite.app.cli bench $(ARGS)

site: $(READY)  ## the report site of the published runs
	@$(BIN)/python -m itera_lite.app.cli report papermill_runs/published/*/ --out papermill_runs/site

lab: $(READY)  ## JupyterLab on the notebooks
	@$(BIN)/jupyter lab --notebook-dir=.

hooks: $(READY)  ## run the pre-commit checks at each commit
	@$(BIN)/pre-commit install
