# `make ladder` and `make test` need python3 (3.11 or newer) and nothing else. Another Python:
# `make test PYTHON=python3.13`, which makes .venv anew where it is of another version.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
STAMP := $(VENV)/.installed-$(VERSION)

.PHONY: ladder test test-slow lint notebooks clean

ladder: $(STAMP)  ## train the CPU ladder and write its report to runs/ladder_cpu
	$(BIN)/python -m experiments.scale_ladder

test: $(STAMP)  ## every test that takes a few seconds at most
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-slow: $(STAMP)  ## the long tests, and those of programs that are compiled as users compile them
	$(BIN)/python -m pytest -n 2 -m "slow and not optimized"
	$(BIN)/python -m pytest -n 2 -m optimized --optimize

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

notebooks: $(STAMP)  ## run the notebooks and store them with their figures, in minutes
	$(BIN)/python -m notebooks.execute

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mup_jax needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; try `make PYTHON=python3.11`")'
	$(PYTHON) -m venv --clear $(VENV)
	@echo "installing the pinned packages into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

clean:
	rm -rf .venv*
