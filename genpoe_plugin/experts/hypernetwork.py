"""The hypernetwork: token states of a passage -> a code -> the weights of an expert."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from genpoe_plugin.experts.config import HypernetworkConfig
from genpoe_plugin.experts.expert import DenseExperts, Experts, FactoredExperts, Factors


class MeanEncoder(nn.Module):
    """The paper's encoder: the mean over a passage's tokens, then ``Linear -> ReLU``.

    Blind to word order, unless the token states know of it.
    """

    def __init__(self, config: HypernetworkConfig) -> None:
        super().__init__()
        self.normalise = config.normalise
        self.project = nn.Linear(config.hidden_size, config.code_size)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        weights = mask.to(states.dtype).unsqueeze(-1)
        mean = (states * weights).sum(1) / weights.sum(1)
        if self.normalise:
            mean = functional.rms_norm(mean, mean.shape[-1:])
        return torch.relu(self.project(mean))


class AttentionEncoder(nn.Module):
    """Learned queries that each look for their own kind of token; what they find is joined and projected.

    Each query is compared with the token states themselves: a projection of the keys could be folded into the query.
    One of the values could be folded into the layer that follows, which without it has one of full width a query.
    """

    def __init__(self, config: HypernetworkConfig) -> None:
        super().__init__()
        self.normalise = config.normalise
        self.queries = nn.Parameter(torch.randn(config.num_queries, config.hidden_size) / math.sqrt(config.hidden_size))
        size = config.value_size
        self.values = nn.Identity() if size is None else nn.Linear(config.hidden_size, size, bias=False)
        self.project = nn.Linear(config.num_queries * (size or config.hidden_size), config.code_size)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        if self.normalise:
            states = functional.rms_norm(states, states.shape[-1:])
        scores = states @ self.queries.mT  # [n, tokens, queries]
        weights = scores.masked_fill(~mask.bool().unsqueeze(-1), -math.inf).softmax(1)
        return torch.relu(self.project(self.values(weights.mT @ states).flatten(1)))


class DenseHead(nn.Module):
    """The paper's generator: one linear layer whose output is every entry of the four matrices."""

    def __init__(self, config: HypernetworkConfig) -> None:
        super().__init__()
        d, r, h = config.hidden_size, config.rank, config.expert_width
        self.shapes = ((r, d), (h, r), (r, h), (d, r))
        self.generate = nn.Linear(config.code_size, 2 * r * (d + h))
        self.gain = config.generator_gain
        for number, shape in enumerate(self.shapes, start=1):
            base = torch.empty(shape)
            nn.init.kaiming_uniform_(base, a=math.sqrt(5))
            if config.base == "silent" and number == len(self.shapes):
                base.zero_()
            # A buffer, not a seed: another torch or device would draw another base, and so another model.
            self.register_buffer(f"base{number}", base)

    def forward(self, code: Tensor) -> DenseExperts:
        parts = (self.gain * self.generate(code)).split([rows * columns for rows, columns in self.shapes], dim=-1)
        return DenseExperts(
            *(
                part.unflatten(-1, shape) + self.get_buffer(f"base{number}")
                for number, (part, shape) in enumerate(zip(parts, self.shapes, strict=True), start=1)
            )
        )


class FactoredHead(nn.Module):
    """Generates two cores of an expert, each the identity at first, between learned matrices that all experts share."""

    def __init__(self, config: HypernetworkConfig) -> None:
        super().__init__()
        d, h, self.size = config.hidden_size, config.expert_width, config.core_size
        self.generate = nn.Linear(config.code_size, 2 * self.size**2)
        self.gain = config.generator_gain
        # Of a scale that keeps that of what they read.
        self.read_up = nn.Parameter(torch.randn(self.size, d) / math.sqrt(d))
        self.write_up = nn.Parameter(torch.randn(h, self.size) / math.sqrt(self.size))
        self.read_down = nn.Parameter(torch.randn(self.size, h) / math.sqrt(h))
        silent = config.base == "silent"
        self.write_down = nn.Parameter(
            torch.zeros(d, self.size) if silent else torch.randn(d, self.size) / math.sqrt(self.size)
        )

    def forward(self, code: Tensor) -> FactoredExperts:
        generated = (self.gain * self.generate(code)).unflatten(-1, (2, self.size, self.size))
        cores = generated + torch.eye(self.size, dtype=code.dtype, device=code.device)
        factors = Factors(self.read_up, self.write_up, self.read_down, self.write_down)
        return FactoredExperts(factors, *cores.unbind(-3))


ENCODERS = {"mean": MeanEncoder, "attention": AttentionEncoder}
HEADS = {"dense": DenseHead, "factored": FactoredHead}


class Hypernetwork(nn.Module):
    """Generates one expert a passage."""

    def __init__(self, config: HypernetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = ENCODERS[config.encoder](config)
        self.head = HEADS[config.head](config)

    def forward(self, states: Tensor, mask: Tensor) -> Experts:
        """Generate experts.

        Args:
            states: ``[n, tokens, d]``, what the LLM has for each token of ``n`` passages.
            mask: ``[n, tokens]``, true on real tokens; at least one a passage.

        Returns:
            ``n`` experts.
        """
        return self.head(self.encoder(states, mask))
