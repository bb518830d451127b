from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from genpoe_plugin.experts.config import HypernetworkConfig
from genpoe_plugin.experts.expert import Experts
from genpoe_plugin.experts.hypernetwork import Hypernetwork


@pytest.fixture
def make_hypernetwork() -> Callable[..., Hypernetwork]:
    """A hypernetwork for the tiny LLMs whose untrained experts speak loudly enough to change what the LLM says."""

    def make(seed: int = 0, **overrides: object) -> Hypernetwork:
        values = {"hidden_size": 32, "layer": 1, "rank": 4, "expert_width": 16, "code_size": 24, "num_queries": 3}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config = HypernetworkConfig(**{**values, "base": "random", "generator_gain": 4.0, **overrides})
            return Hypernetwork(config).eval().requires_grad_(False)

    return make


@pytest.fixture
def random_experts() -> Callable[..., Experts]:
    """Experts with normal entries and the given leading dimensions."""

    def make(*leading: int, d: int = 32, r: int = 4, h: int = 16, seed: int = 0) -> Experts:
        generator = torch.Generator().manual_seed(seed)
        shapes = ((r, d), (h, r), (r, h), (d, r))
        return Experts(*(torch.randn(*leading, *shape, generator=generator) * 0.4 for shape in shapes))

    return make
