"""A ranking task that a tiny LLM learns in seconds."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

COLOURS = ("red", "blue", "green", "white", "black", "grey", "pink", "brown")


@pytest.fixture(scope="session")
def make_reranker_data() -> Callable[..., Path]:
    """``make(path, examples, seed, prompt="Yes or No?")``: a query's positives are the passages with its colour."""

    def make(path: Path, examples: int, seed: int, prompt: str = "Yes or No?") -> Path:
        rng = random.Random(seed)
        lines = []
        for _ in range(examples):
            query, *others = rng.sample(COLOURS, 5)
            record = {"query": query, "pos": [f"is {query}"], "neg": [f"is {other}" for other in others]}
            lines.append(json.dumps({**record, "prompt": prompt}))
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return make
