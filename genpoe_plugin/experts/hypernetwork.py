"""The hypernetwork: token embeddings of a passage -> a code -> the weights of an expert."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from genpoe_plugin.experts.config import HypernetworkConfig
from genpoe_plugin.experts.expert import Experts


class MeanEncoder(nn.Module):
    """The paper's encoder: the mean over a passage's tokens, then ``Linear -> ReLU``. Blind to word order."""

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

    Each query is compared with the token states themselves: a projection of the keys could be folded into the query,
    one of the values into the projection that follows.
    """

    def __init__(self, config: HypernetworkConfig) -> None:
        super().__init__()
        self.normalise = config.normalise
        self.queries = nn.Parameter(torch.randn(config.num_queries, config.hidden_size) / math.sqrt(config.hidden_size))
        self.project = nn.Linear(config.num_queries * config.hidden_size, config.code_size)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        if self.normalise:
            states = functional.rms_norm(states, states.shape[-1:])
        scores = states @ self.queries.mT  # [n, tokens, queries]
        weights = scores.masked_fill(~mask.bool().unsqueeze(-1), -math.inf).softmax(1)
        return torch.relu(self.project((weights.mT @ states).flatten(1)))


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

    def forward(self, code: Tensor) -> Experts:
        parts = (self.gain * self.generate(code)).split([rows * columns for rows, columns in self.shapes], dim=-1)
        return Experts(
            *(
                part.unflatten(-1, shape) + self.get_buffer(f"base{number}")
                for number, (part, shape) in enumerate(zip(parts, self.shapes, strict=True), start=1)
            )
        )


ENCODERS = {"mean": MeanEncoder, "attention": AttentionEncoder}
HEADS = {"dense": DenseHead}


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
            states: ``[n, tokens, d]``, the LLM's embeddings of ``n`` passages.
            mask: ``[n, tokens]``, true on real tokens; at least one a passage.

        Returns:
            ``n`` experts.
        """
        return self.head(self.encoder(states, mask))
