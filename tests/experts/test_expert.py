from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from genpoe_plugin.experts.expert import Experts


def naive_mix(one_expert, x: torch.Tensor, experts: Experts, gates: torch.Tensor) -> np.ndarray:
    """The sum over experts, one token and one expert at a time, in float64."""
    rows, tokens, width = x.shape
    result = np.zeros((rows, tokens, width))
    for row in range(rows):
        for token in range(tokens):
            for k in range(gates.shape[1]):
                result[row, token] += float(gates[row, k]) * one_expert(experts[row][k], x[row, token]).numpy()
    return result


# The parameter of `head` is the same for all examples of one test.
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 4), tokens=st.integers(1, 5), count=st.integers(1, 5), rank=st.integers(1, 6),
    width=st.integers(1, 9), seed=st.integers(0, 1000),
)  # fmt: skip
def test_mix_equals_a_naive_loop_in_float64(random_experts, one_expert, head, rows, tokens, count, rank, width, seed):
    experts = random_experts(rows, count, head=head, d=7, r=rank, h=width, seed=seed).map(lambda weight: weight * 2.5)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, tokens, 7, generator=generator)
    gates = torch.rand(rows, count, generator=generator).softmax(1)
    naive = naive_mix(one_expert, x, experts, gates)
    scale = max(1.0, np.abs(naive).max())
    assert np.abs(experts.mix(x, gates).numpy() - naive).max() <= 1e-5 * scale


def test_each_expert_is_its_own(random_experts, head):
    """Swapping two experts without their gates changes the sum; with them it does not."""
    experts = random_experts(1, 2, head=head)
    x = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(1))
    gates = torch.tensor([[0.8, 0.2]])
    swapped = experts.map(lambda weight: weight.flip(1))
    whole = experts.mix(x, gates)
    assert torch.allclose(swapped.mix(x, gates.flip(1)), whole, atol=1e-6)
    assert not torch.allclose(swapped.mix(x, gates), whole, atol=1e-2)


def test_a_gate_of_zero_takes_an_expert_out_exactly(random_experts, head):
    experts = random_experts(2, 3, head=head)
    x = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(2))
    gates = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
    louder = experts.map(torch.clone)
    for weight in louder.weights:
        weight[:, 2] *= 100
    assert torch.equal(experts.mix(x, gates), louder.mix(x, gates))


def test_an_expert_of_zeros_says_nothing(random_experts, head):
    experts = random_experts(2, 3, head=head).map(torch.zeros_like)
    assert torch.count_nonzero(experts.mix(torch.randn(2, 4, 32), torch.ones(2, 3))) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_result_has_the_experts_dtype(random_experts, head, dtype):
    mixed = random_experts(1, 2, head=head).to(dtype).mix(torch.randn(1, 2, 32), torch.ones(1, 2))
    assert mixed.dtype == dtype


@pytest.mark.parametrize(("head", "numbers"), [("dense", 2 * 4 * (32 + 16)), ("factored", 2 * 4 * 4)])
def test_indexing_stacking_and_size(random_experts, head, numbers):
    experts = random_experts(3, head=head)
    assert len(experts) == 3 and experts.width == 32
    assert all(
        torch.equal(*pair)
        for pair in zip(Experts.stack([experts[i] for i in range(3)]).weights, experts.weights, strict=True)
    )
    one = experts.unsqueeze(1)
    assert all(weight.shape[:2] == (3, 1) for weight in one.weights)
    assert experts.nbytes == 4 * 3 * numbers
    assert experts[0].to(torch.bfloat16).nbytes == 2 * numbers


def test_what_experts_share_stays_one_object(random_experts):
    experts = random_experts(3, head="factored")
    for other in (experts[1], experts.unsqueeze(1), experts.map(torch.clone), Experts.stack([experts[0], experts[2]])):
        assert all(ours is theirs for ours, theirs in zip(other.factors, experts.factors, strict=True))


def test_gradients_equal_finite_differences(random_experts, head):
    """Of each expert's own weights and of what all share."""
    experts = random_experts(2, 2, head=head, d=3, r=2, h=4).to(torch.float64)
    x = torch.randn(2, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    gates = torch.tensor([[0.7, 0.3], [1.0, 0.5]], dtype=torch.float64)
    shared = experts.factors if head != "dense" else ()

    def mixed(*tensors):
        own = tensors[len(shared) :]
        built = type(experts)(type(shared)(*tensors[: len(shared)]), *own) if shared else type(experts)(*own)
        return built.mix(x, gates)

    tensors = [tensor.clone().requires_grad_() for tensor in (*shared, *experts.weights)]
    assert torch.autograd.gradcheck(mixed, tensors)
