PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

.PHONY: demo leaderboard test lint wheel-test clean

demo: .venv/installed  ## the whole story, in a few minutes on two cores
	$(BIN)/genpoe demo

leaderboard: demo  ## its full matrix of modes, controls and seeds, one page
	$(BIN)/genpoe compare --run demo-out/matrix.yaml --jobs 2

test: .venv/installed
	$(BIN)/python -m pytest

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

wheel-test: .venv/installed  ## the built package, in fresh environments, under the stock lm_eval
	$(BIN)/python -m pytest -m wheel

clean:
	rm -rf .venv demo-out

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@
