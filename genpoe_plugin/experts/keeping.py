"""How experts are kept where nothing else is said. Without torch, so that what only names it need not load that."""

from __future__ import annotations

DTYPES = ("float32", "float16", "bfloat16", "int8")
"""Of experts, by the names that torch and users give."""
ON_DEVICE, ON_HOST = 2 * 10**9, 8 * 10**9
"""Bytes of experts beside the LLM, and in memory beyond it."""
