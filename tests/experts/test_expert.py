from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genpoe_plugin.experts.expert import Experts, mix_experts


def naive_mix(x: torch.Tensor, experts: Experts, gates: torch.Tensor) -> np.ndarray:
    """The sum over experts, one token and one expert at a time, in float64."""
    w1, w2, w3, w4 = (weight.double().numpy() for weight in experts.weights)
    rows, tokens, width = x.shape
    result = np.zeros((rows, tokens, width))
    for row in range(rows):
        for token in range(tokens):
            vector = x[row, token].double().numpy()
            for k in range(gates.shape[1]):
                hidden = np.maximum(w2[row, k] @ (w1[row, k] @ vector), 0)
                result[row, token] += float(gates[row, k]) * (w4[row, k] @ (w3[row, k] @ hidden))
    return result


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 4), tokens=st.integers(1, 5), count=st.integers(1, 5), rank=st.integers(1, 6),
    width=st.integers(1, 9), seed=st.integers(0, 1000),
)  # fmt: skip
def test_mix_equals_a_naive_loop_in_float64(rows, tokens, count, rank, width, seed):
    generator = torch.Generator().manual_seed(seed)
    d = 7
    shapes = ((rank, d), (width, rank), (rank, width), (d, rank))
    experts = Experts(*(torch.randn(rows, count, *shape, generator=generator) for shape in shapes))
    x = torch.randn(rows, tokens, d, generator=generator)
    gates = torch.rand(rows, count, generator=generator).softmax(1)
    naive = naive_mix(x, experts, gates)
    scale = max(1.0, np.abs(naive).max())
    assert np.abs(mix_experts(x, experts, gates).numpy() - naive).max() <= 1e-5 * scale


def test_each_expert_is_its_own(random_experts):
    """Swapping two experts without their gates changes the sum; with them it does not."""
    experts, x = random_experts(1, 2), torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(1))
    gates = torch.tensor([[0.8, 0.2]])
    swapped = Experts(*(weight.flip(1) for weight in experts.weights))
    whole = mix_experts(x, experts, gates)
    assert torch.allclose(mix_experts(x, swapped, gates.flip(1)), whole, atol=1e-6)
    assert not torch.allclose(mix_experts(x, swapped, gates), whole, atol=1e-2)


def test_a_gate_of_zero_takes_an_expert_out_exactly(random_experts):
    experts, x = random_experts(2, 3), torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(2))
    gates = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
    louder = Experts(*(weight.clone() for weight in experts.weights))
    for weight in louder.weights:
        weight[:, 2] *= 100
    assert torch.equal(mix_experts(x, experts, gates), mix_experts(x, louder, gates))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_result_has_the_experts_dtype(random_experts, dtype):
    mixed = mix_experts(torch.randn(1, 2, 32), random_experts(1, 2).to(dtype), torch.ones(1, 2))
    assert mixed.dtype == dtype


def test_indexing_stacking_and_size(random_experts):
    experts = random_experts(3)
    assert len(experts) == 3
    assert all(
        torch.equal(*pair)
        for pair in zip(Experts.stack([experts[i] for i in range(3)]).weights, experts.weights, strict=True)
    )
    assert experts.nbytes == 4 * 3 * 2 * 4 * (32 + 16)
