"""Generative passage-level mixture of experts: retrieved passages become experts inside a frozen LLM."""

__version__ = "0.1.0"
