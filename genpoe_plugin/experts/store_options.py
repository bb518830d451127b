"""Options of the expert store: dtypes and default budgets. Without torch, so that the command line starts fast."""

from __future__ import annotations

DTYPES = ("float32", "float16", "bfloat16", "int8")
"""The dtypes of stored experts, by the names that torch gives them."""
ON_DEVICE, ON_HOST = 2 * 10**9, 8 * 10**9
"""Default budgets in bytes: on the LLM's device, and in the host's memory."""
