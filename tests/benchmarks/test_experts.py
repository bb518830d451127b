"""The benchmark of expert generation: its FLOPs, its parameters and its rows."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import experts
from genpoe_plugin.experts.config import HypernetworkConfig

TINY = experts.Sizes(width=32, rank=4, passages=3, product=16, rounds=2)


@pytest.fixture
def network():
    config = HypernetworkConfig.preset("paper", hidden_size=TINY.width, layer=0, rank=TINY.rank)
    return experts.random_hypernetwork(config, "cpu")


def test_flops_equal_those_that_torch_counts(network):
    states, mask = torch.ones(3, 5, 32, dtype=experts.DTYPE), torch.ones(3, 5, dtype=torch.bool)
    with FlopCounterMode(display=False) as counter:
        network(states, mask)
    means = 2 * 3 * 5 * 32  # over the tokens
    assert experts.generation_flops(network, 3) + means == counter.get_total_flops()


def test_the_number_of_parameters_is_that_of_the_papers_form(network):
    d, r, h = 32, 4, network.config.code_size
    expert = 4 * d * r
    assert experts.numbers_of(network) == (d + 1) * h + (h + 1) * expert + expert


def test_a_random_hypernetwork_has_different_experts(network):
    states = torch.rand(2, 5, 32).to(experts.DTYPE)
    first, second = (network(states[n : n + 1], torch.ones(1, 5, dtype=torch.bool)) for n in range(2))
    assert all(not torch.equal(one, two) for one, two in zip(first.weights, second.weights, strict=True))


def test_rows_follow_from_the_measurements():
    found = {"generation": 2.0, "single": 0.5, "product": 1.0, "read": 1.0, "fraction": 0.6}
    found |= {"flops": 6000.0, "read_rate": 100.0, "weights": 300, "results": 100, "peak": 420}
    rows = {row.name: row for row in experts.rows_of(found, TINY)}
    assert rows["experts.matmul_fraction"].holds is False
    assert rows["experts.peak_memory_ratio"].value == 1.05 and rows["experts.peak_memory_ratio"].holds
    rate = 2 * 16**3  # FLOPs per second
    assert rows["experts.generation_floor"].value == pytest.approx(1000 * max(6000 / rate, 4) / 3)
