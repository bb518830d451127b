"""What vLLM's LoRA layers would make of the tensors of a set, against the experts' own formulas."""

from __future__ import annotations

import pytest
import torch

from genpoe_plugin.experts.config import HypernetworkConfig
from genpoe_plugin.experts.expert import DenseExperts, Experts, FactoredExperts, Factors
from genpoe_plugin.vllm_engine.expert_sets import BASE, adapters, carriers, expert_set

D, H, R = 32, 16, 4
GATES = (0.5, 0.3, 0.2)


@pytest.fixture
def make_experts():
    def make(head: str, count: int) -> Experts:
        generator = torch.Generator().manual_seed(count)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator) * 0.4

        if head == "dense":
            return DenseExperts(*(draw(count, *shape) for shape in ((R, D), (H, R), (R, H), (D, R))))
        factors = Factors(*(draw(*shape) for shape in ((R, D), (H, R), (R, H), (D, R))))
        return FactoredExperts(factors, draw(count, R, R), draw(count, R, R))

    return make


def config(head: str) -> HypernetworkConfig:
    return HypernetworkConfig(hidden_size=D, layers=(1,), expert_width=H, rank=R, core_size=R, head=head)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("head", ["dense", "factored", "memory"])
def test_the_adapters_compute_the_gated_sum(make_experts, one_expert, head, count):
    experts, gates = make_experts(head, count), GATES[:count]
    pairs = adapters(expert_set(experts, gates, 0))
    x = torch.randn(D, generator=torch.Generator().manual_seed(9))

    def layer(name: str, inner: torch.Tensor) -> torch.Tensor:
        a, b = pairs[f"genpoe_{name}"]
        return b @ (a @ inner)

    if isinstance(experts, FactoredExperts):
        read_up, write_up, read_down, write_down = experts.factors
        inner = layer("up", read_up @ x).view(count, R)
        found = write_down @ layer("down", (torch.relu(inner @ write_up.mT) @ read_down.mT).flatten())
    else:
        found = sum(layer(f"down{number}", torch.relu(layer(f"up{number}", x))) for number in range(count))
    expected = sum(gate * one_expert(experts[number], x) for number, gate in enumerate(gates))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("start", [0, 1, 255, 256, 70_000, 2**24 - 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_start_is_exact_in_any_precision(make_experts, start, dtype):
    a, b = adapters(expert_set(make_experts("factored", 1).to(dtype), (1.0,), start))["genpoe_start"]
    assert b.dtype == dtype
    digits = (b @ a).double().flatten().tolist()
    assert sum(digit * BASE**place for place, digit in enumerate(digits)) == start


@pytest.mark.parametrize("head", ["dense", "factored", "memory"])
def test_every_set_fits_the_layers_made_for_it(make_experts, head):
    """Sets of fewer experts are parts of what the layers have room for, from their beginning."""
    for most in (1, 3):
        layers = carriers(config(head), most)
        for count in range(1, most + 1):
            pairs = adapters(expert_set(make_experts(head, count), GATES[:count], 7))
            assert pairs.keys() <= layers.keys()
            for name, (a, b) in pairs.items():
                carrier = layers[name]
                assert a.shape[0] == b.shape[1] == carrier.rank
                assert a.shape[1] <= carrier.inputs and b.shape[0] <= carrier.outputs
            if count == most:
                assert pairs.keys() == layers.keys()
                assert all(
                    (a.shape[1], b.shape[0]) == (layers[n].inputs, layers[n].outputs) for n, (a, b) in pairs.items()
                )


def test_identities_do_not_travel(make_experts):
    parts = expert_set(make_experts("factored", 3), GATES, 0)
    assert {*parts} == {"genpoe_up.B", "genpoe_down.A", "genpoe_start.B"}
    assert sum(part.numel() for part in parts.values()) == 2 * 3 * R * R + 3
