# `make ladder` and `make test` need python3 (3.11 or newer) and nothing else.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: ladder test test-slow lint notebooks clean

ladder: $(STAMP)  ## train the CPU ladder and write its report to runs/ladder_cpu
	$(BIN)/python -m experiments.scale_ladder

test: $(STAMP)  ## every test that takes less than a minute
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-slow: $(STAMP)  ## the long tests
	$(BIN)/python -m pytest -m slow

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

notebooks: $(STAMP)  ## run the notebooks and store them with their figures, in minutes
	$(BIN)/python -m notebooks.execute

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mup_jax needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; try `make PYTHON=python3.11`")'
	$(PYTHON) -m venv .venv
	@echo "installing the pinned packages into .venv"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

clean:
	rm -rf .venv
