"""The branch beside the MLP of one layer on vLLM: LoRA adapters hold the experts of each request."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearMethodBase, ReplicatedLinear
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from genpoe_plugin.experts.config import HypernetworkConfig
from genpoe_plugin.experts.expert import Factors
from genpoe_plugin.vllm_engine.expert_sets import BASE, DIGITS, PREFIX, START, Carrier, carriers, is_factored


class _ZeroOutput(LinearMethodBase):
    """A linear layer without weights; its output is zero, plus what an adapter adds."""

    def create_weights(self, layer: nn.Module, *sizes: Any, **attributes: Any) -> None:
        # vLLM creates the slots for adapters on the device of the weight.
        layer.register_parameter("weight", nn.Parameter(torch.empty(0), requires_grad=False))

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return x.new_zeros(x.shape[0], cast(int, layer.output_size))


class _WithoutWeights(QuantizationConfig):
    """A quantisation that makes vLLM use `_ZeroOutput`, because quantisations decide how a layer stores its weights."""

    def get_name(self) -> Any:
        return "none"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> _WithoutWeights:
        return cls()

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase:
        return _ZeroOutput()


class Start(nn.Module):
    """Computes which tokens the experts act on, from the start position in each request's adapter.

    Args:
        max_tokens: largest number of tokens in a forward pass.
    """

    ones: Tensor
    places: Tensor

    def __init__(self, max_tokens: int) -> None:
        super().__init__()
        self.add_module(START, carrier_layer(Carrier(1, 1, DIGITS), START))
        self.register_buffer("ones", torch.ones(max_tokens, 1), persistent=False)
        places = torch.tensor([float(BASE**place) for place in range(DIGITS)], dtype=torch.float32)
        self.register_buffer("places", places, persistent=False)

    def forward(self, positions: Tensor) -> Tensor:
        """Whether each token is at or after the start of its request, ``[tokens]``."""
        digits = getattr(self, START)(self.ones[: len(positions)])
        return positions >= digits.float() @ self.places

    def slots(self, tokens: int) -> Tensor | None:
        """The adapter slot of each token, -1 for none; None before vLLM has made slots."""
        adapters = getattr(getattr(self, START), "punica_wrapper", None)
        return None if adapters is None else adapters.token_lora_indices[:tokens]


class Branch(nn.Module):
    """``mask ⊙ Σ_k g_k · E_k(x)`` for every token, with ``x`` the input of the MLP.

    Args:
        config: configuration of the hypernetwork.
        num_passages: largest number of experts per request.
        max_tokens: largest number of tokens in a forward pass.
        prefix: name of this module in the model.
    """

    active: Tensor
    read_up: Tensor
    write_up: Tensor
    read_down: Tensor
    write_down: Tensor

    def __init__(self, config: HypernetworkConfig, num_passages: int, max_tokens: int, prefix: str) -> None:
        super().__init__()
        self.num_passages = num_passages
        self.factored = is_factored(config)
        for name, carrier in carriers(config, num_passages).items():
            if name != START:
                self.add_module(name, carrier_layer(carrier, f"{prefix}.{name}"))
        if self.factored:
            d, h, p = config.hidden_size, config.expert_width, config.core_size
            for name, shape in zip(Factors._fields, ((p, d), (h, p), (p, h), (d, p)), strict=True):
                self.register_parameter(name, nn.Parameter(torch.empty(shape), requires_grad=False))
        self.register_buffer("active", torch.zeros(max_tokens, 1), persistent=False)

    def load(self, factors: Iterable[tuple[str, Tensor]]) -> None:
        """Copy the shared matrices of a factored hypernetwork."""
        for name, value in factors:
            self.get_parameter(name).data.copy_(value)

    def set_active(self, active: Tensor) -> None:
        """Set which tokens of the next forward pass the experts act on, ``[tokens]``."""
        self.active[: len(active), 0] = active.to(self.active.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[tokens, d]`` to the experts' gated output, ``[tokens, d]``."""
        mixed = self._factored(x) if self.factored else self._dense(x)
        return mixed * self.active[: len(x)]

    def _factored(self, x: Tensor) -> Tensor:
        up, down = getattr(self, f"{PREFIX}up"), getattr(self, f"{PREFIX}down")
        inner = up(x @ self.read_up.mT).unflatten(-1, (self.num_passages, -1))
        inner = torch.relu(inner @ self.write_up.mT) @ self.read_down.mT
        return down(inner.flatten(1)) @ self.write_down.mT

    def _dense(self, x: Tensor) -> Tensor:
        mixed = torch.zeros_like(x)
        for number in range(self.num_passages):
            inner = torch.relu(getattr(self, f"{PREFIX}up{number}")(x))
            mixed = mixed + getattr(self, f"{PREFIX}down{number}")(inner)
        return mixed


def carrier_layer(carrier: Carrier, prefix: str) -> ReplicatedLinear:
    """A linear layer whose output comes from LoRA adapters alone."""
    return ReplicatedLinear(
        carrier.inputs,
        carrier.outputs,
        bias=False,
        quant_config=_WithoutWeights(),
        prefix=prefix,
        return_bias=False,
        disable_tp=True,
    )
