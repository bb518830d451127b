"""Experts on vLLM in two processes: tokens and log-probabilities of one process, for the form that is hardest to split.

``python -m benchmarks vllm-processes`` runs every form in every layout.
"""

from __future__ import annotations

import pytest

from benchmarks import vllm_processes


def test_two_tensor_parallel_processes(tmp_path):
    vllm_processes.write_parts(tmp_path)
    form = "trained_attention"
    one = vllm_processes.run(tmp_path, form, vllm_processes.ONE)
    two = vllm_processes.run_layout(tmp_path, form, "tensor")
    assert two is not None, "the engine has to start"
    for (tokens, values), (own, own_values) in zip(one["experts"], two["experts"], strict=True):
        assert own == tokens
        assert own_values == pytest.approx(values, abs=1e-4)
    assert two["plain"] == one["plain"]
    changed = sum(tokens != plain for (tokens, _), plain in zip(one["experts"], one["plain"], strict=True))
    assert changed > len(one["plain"]) // 3, "experts have to matter"
