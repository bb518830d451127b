"""Making vLLM find our models. It calls `register` in every one of its processes (``vllm.general_plugins``)."""

from __future__ import annotations

FAMILIES = ("Llama", "Qwen2", "Qwen3", "Mistral", "Gemma")
"""The families of LLMs that experts can be served beside, as in the names of their classes."""


def architecture(family: str) -> str:
    """The name under which vLLM knows the model class of a family."""
    return f"GenPoE{family}ForCausalLM"


def register() -> None:
    """Tell vLLM the names of our models; nothing is imported before one is used."""
    from vllm import ModelRegistry

    for family in FAMILIES:
        name = architecture(family)
        ModelRegistry.register_model(name, f"genpoe_plugin.vllm_engine.model:{name}")
