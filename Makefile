# Everything happens in .venv/ of this checkout; no environment has to be active, and an active one is not touched.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
INPUT  ?=
ARGS   ?=

export INPUT
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test test-all lint format lock clean

help:  ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | while IFS='|' read -r name what; do \
	    printf '%-16s %s\n' "$$name" "$$what"; done

setup: $(READY)  ## Make the environment in .venv/ (1 to 2 minutes the first time; PYTHON=python3.12 to choose one)
	@echo 'setup: ready; the command is $(BIN)/moe-dist'

demo: $(READY)  ## Train a small MoE model on real text under Ray (INPUT=DIR for your text, ARGS='key=value ...')
	$(BIN)/moe-dist train configs/demo.yaml --again $${INPUT:+"data.input='$$INPUT'"} $(ARGS)

test: $(READY)  ## Run the test suite without the long proofs (ARGS='-k name' for some of it)
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

test-all: $(READY)  ## Run every test, the long proofs too
	$(BIN)/python -m pytest $(ARGS)

lint: $(READY)  ## Check style, layout and types (ruff, mypy)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)  ## Lay the code out and repair what ruff can repair
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The stamp names the folder it was made for: an unfinished environment, or one of a checkout that moved, is made anew.
ifneq ($(shell cat $(READY) 2>/dev/null),$(CURDIR))
.PHONY: $(READY)
ANEW := --clear
endif

$(READY): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo 'make: $(PYTHON) is missing or older than Python 3.11; name a newer one: make setup PYTHON=python3.12' >&2; \
	    exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
	    echo 'make: $(PYTHON) cannot make environments; on Debian and Ubuntu install the package python3-venv' >&2; \
	    exit 2; }
	@echo 'setup: installing into $(VENV)/ what requirements.lock names, and torch (about 1 to 2 minutes the first time)'
	@rm -f $(READY)
	$(PYTHON) -m venv $(ANEW) $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c requirements.lock -e '.[dev]'
	@echo '$(CURDIR)' > $(READY)

lock:  ## Resolve the newest allowed packages afresh into requirements.lock
	@echo 'lock: resolving in a fresh environment (about 2 minutes)'
	@set -e; folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	$(PYTHON) -m venv "$$folder/venv"; \
	"$$folder/venv/bin/python" -m pip install --disable-pip-version-check --quiet -e '.[dev]'; \
	"$$folder/venv/bin/python" -m pip freeze --exclude-editable > "$$folder/frozen"; \
	{ echo '# Made by `make lock`: pip install -e .[dev] in a fresh environment, then pip freeze, less the torch, triton,'; \
	  echo '# nvidia and cuda packages, which pip chooses for the machine within the range in pyproject.toml.'; \
	  echo '# Used as a constraints file: pip install -c requirements.lock -e .[dev]'; \
	  grep -vE '^(torch|triton|nvidia|cuda)([-_=]| @)' "$$folder/frozen"; } > "$$folder/lock"; \
	mv "$$folder/lock" requirements.lock; \
	echo "lock: $$(grep -c == requirements.lock) packages in requirements.lock"

clean:  ## Remove the environment and the caches (runs/ stays)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
