"""A tiny LLM on vLLM beside the same on transformers. Without vLLM there is nothing to test here (`make test-vllm`)."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# Read by vLLM when it is imported. In one process, so that no engine is left behind and none has to be waited for.
os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_LOGGING_LEVEL="WARNING")

import pytest

collect_ignore_glob = ["test_*.py"] if find_spec("vllm") is None else []

# vLLM's attention on a CPU wants heads of 32.
SIZES = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
# Few slots, few tokens a step, small blocks: prompts in several chunks and partly in the prefix cache, expert sets in
# many waves.
SMALL = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 512,
    "kv_cache_memory_bytes": 2**26,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 32,
    "block_size": 32,
    "max_loras": 4,
    "max_cpu_loras": 8,
    "disable_log_stats": True,
}


def save_parts(folder: Path, llm: Any, tokenizer: Any, network: Any) -> dict[str, str]:
    """Write an LLM, its tokenizer and a hypernetwork; returns their directories by name."""
    from genpoe_plugin.checkpoints.checkpoint import save_hypernetwork

    paths = {name: folder / name for name in ("llm", "tokenizer", "hypernetwork")}
    llm.save_pretrained(paths["llm"])
    tokenizer.save_pretrained(paths["tokenizer"])
    save_hypernetwork(paths["hypernetwork"], network, llm, tokenizer, {})
    return {name: str(path) for name, path in paths.items()}


@pytest.fixture(scope="session", autouse=True)
def models():
    """Model classes given to vLLM as they are: those named only, it would look at in a process of its own, for long."""
    from vllm import ModelRegistry
    from vllm.plugins import load_general_plugins

    from genpoe_plugin.vllm_engine import model
    from genpoe_plugin.vllm_engine.registration import FAMILIES, architecture

    load_general_plugins()
    for family in FAMILIES:
        ModelRegistry.register_model(architecture(family), getattr(model, architecture(family)))


@pytest.fixture(scope="session")
def llm(make_llm):
    return make_llm("llama", **SIZES)


@pytest.fixture(scope="session")
def llm_dir(tmp_path_factory, llm, tokenizer) -> Path:
    directory = tmp_path_factory.mktemp("llm")
    llm.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def hypernetwork_dir(make_hypernetwork_dir) -> Path:
    return make_hypernetwork_dir(hidden_size=64, head="factored", states="contextual")


@pytest.fixture(scope="session")
def make_vllm(llm_dir, hypernetwork_dir) -> Callable[..., Any]:
    """``make_vllm(mode, **options)``: the vLLM class with the LLM, hypernetwork and arguments that `make_lm` has."""
    from genpoe_plugin.lm.vllm import GenPoEVLLM

    def make(mode: str = "genpoe", **options: Any) -> GenPoEVLLM:
        if mode.startswith("genpoe"):
            options.setdefault("hypernetwork", str(hypernetwork_dir))
        return GenPoEVLLM(**{"pretrained": str(llm_dir), "mode": mode, **SMALL, **options})

    return make
