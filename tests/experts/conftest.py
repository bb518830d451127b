from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from genpoe_plugin.experts.config import HypernetworkConfig
from genpoe_plugin.experts.expert import DenseExperts, Experts, FactoredExperts, Factors
from genpoe_plugin.experts.hypernetwork import Hypernetwork


@pytest.fixture(params=["dense", "factored", "memory"])
def head(request: pytest.FixtureRequest) -> str:
    """The heads, for the laws that hold for all; the experts of the last two are of one form."""
    return request.param


@pytest.fixture
def make_hypernetwork() -> Callable[..., Hypernetwork]:
    """A hypernetwork for the tiny LLMs whose untrained experts speak loudly enough to change what the LLM says."""

    def make(seed: int = 0, **overrides: object) -> Hypernetwork:
        values = {"hidden_size": 32, "layer": 1, "rank": 4, "core_size": 6, "expert_width": 16, "code_size": 24}
        values |= {"num_queries": 3, "base": "random", "generator_gain": 4.0}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Hypernetwork(HypernetworkConfig.from_dict({**values, **overrides})).eval().requires_grad_(False)

    return make


@pytest.fixture(scope="session")
def random_experts() -> Callable[..., Experts]:
    """Experts with normal entries and the given leading dimensions; ``r`` is the inner width of either form."""

    def make(*leading: int, head: str = "dense", d: int = 32, r: int = 4, h: int = 16, seed: int = 0) -> Experts:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator) * 0.4

        if head == "dense":
            return DenseExperts(*(draw(*leading, *shape) for shape in ((r, d), (h, r), (r, h), (d, r))))
        factors = Factors(*(draw(*shape) for shape in ((r, d), (h, r), (r, h), (d, r))))
        return FactoredExperts(factors, draw(*leading, r, r), draw(*leading, r, r))

    return make
