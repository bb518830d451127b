"""Passages as experts: the maths, the hypernetwork that generates them, and their place beside an LLM's MLP."""
