"""Register our models with vLLM, which calls `register` in each of its processes (``vllm.general_plugins``)."""

from __future__ import annotations

FAMILIES = ("Llama", "Qwen2", "Qwen3", "Mistral", "Gemma", "Gemma2", "Gemma3")
"""The supported families of LLMs, as in the names of their classes."""


def architecture(family: str) -> str:
    """The name of a family's model class in vLLM."""
    return f"GenPoE{family}ForCausalLM"


def register() -> None:
    """Register the names of our models; their module is imported on first use."""
    from vllm import ModelRegistry

    for family in FAMILIES:
        name = architecture(family)
        ModelRegistry.register_model(name, f"genpoe_plugin.vllm_engine.model:{name}")
