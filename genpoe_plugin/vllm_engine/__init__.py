"""Experts on vLLM: a model class per supported family of LLMs, and an engine that serves requests."""
