"""The benchmark of an LLM of real size, here with a tiny LLM on a CPU."""

from __future__ import annotations

import pytest
import torch

from benchmarks import random_llm, real_size
from benchmarks.options import Options
from genpoe_plugin.errors import InputError


@pytest.fixture
def tiny(monkeypatch) -> None:
    monkeypatch.setattr(random_llm, "WORDS", 500)
    monkeypatch.setattr(real_size, "QUICK", real_size.Sizes(64, 4, 16, 2, (2,), 1))


def test_every_batch_size_has_its_rows(tiny, tmp_path):
    rows = {row.name: row for row in real_size.measure(Options(True, tmp_path, None, None))}
    aims = {name: row.target for name, row in rows.items() if row.target}
    assert aims == {
        "real_size.closed_book_time_ratio_cached_2": "<= 1.25",
        "real_size.closed_book_time_ratio_cold_2": "<= 2",
        "real_size.rag_speedup_cached_2": ">= 3",
        "real_size.first_token_ratio_2": "<= 1.3",
    }
    assert rows["real_size.rag_speedup_cold_2"].value == pytest.approx(
        rows["real_size.rag_2"].value / rows["real_size.cold_2"].value
    )
    # One layer, keys and values of two heads of 16 numbers in 16 bits, for each of 103 tokens.
    assert rows["real_size.expert_bytes"].value == 103 * 2 * 2 * 16 * 2


def test_the_full_size_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="needs a GPU"):
        real_size.measure(Options(False, None, None, None))


def test_the_random_llm_has_the_given_shape_and_dtype():
    model, _ = random_llm.random_llm(64, 2, head_width=16, kv_heads=2, dtype=torch.bfloat16)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert model.model.layers[0].self_attn.k_proj.weight.shape == (2 * 16, 64)
    assert torch.get_default_dtype() == torch.float32
