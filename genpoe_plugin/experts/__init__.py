"""Passages as experts: the maths, the hypernetwork that generates them, the store, and the injection into an LLM."""
