"""vLLM's models with experts beside one MLP or in the attention; one mixin serves all families."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from safetensors import safe_open
from torch import Tensor
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.models.gemma import GemmaForCausalLM
from vllm.model_executor.models.gemma2 import Gemma2ForCausalLM
from vllm.model_executor.models.gemma3 import Gemma3ForCausalLM
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.model_executor.models.utils import PPMissingLayer
from vllm.platforms import current_platform

from genpoe_plugin.checkpoints.checkpoint import WEIGHTS, resolve_checkpoint
from genpoe_plugin.experts.attention import AttentionShape
from genpoe_plugin.experts.config import HypernetworkConfig
from genpoe_plugin.experts.expert import Factors
from genpoe_plugin.vllm_engine.attention import ExpertBank, join_experts
from genpoe_plugin.vllm_engine.branch import Branch, Start
from genpoe_plugin.vllm_engine.cpu_lora import fix_cpu_lora
from genpoe_plugin.vllm_engine.expert_sets import START


def _with_branch(mlp: Any) -> Any:
    """A subclass of an MLP class that adds the output of its module ``genpoe``."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return mlp.forward(self, x) + self.genpoe(x)

    return type(f"{mlp.__name__}WithBranch", (mlp,), {"forward": forward})


class WithExperts:
    """Adds experts to a vLLM model.

    Its settings are in ``hf_config.genpoe``: ``hypernetwork`` (directory or hub id, accessible from every node),
    ``config`` (the hypernetwork's configuration), ``layers`` (those that read experts in the attention) and
    ``num_passages``.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **options: Any) -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, **options)  # type: ignore[call-arg]
        settings = vllm_config.model_config.hf_config.genpoe
        config = HypernetworkConfig.from_dict(settings["config"])
        self._hypernetwork = settings["hypernetwork"]
        self._needs_cpu_fix = current_platform.is_cpu()
        captured = vllm_config.compilation_config.max_cudagraph_capture_size or 0
        tokens = max(vllm_config.scheduler_config.max_num_batched_tokens, captured)
        # In every process, because vLLM cannot start a process without any layer for adapters.
        self.genpoe = Start(tokens)
        self._has_branch = False
        self.bank: ExpertBank | None = None
        if config.head == "attention":
            self._join(AttentionShape.of(config), settings["layers"])
        else:
            self._branch_beside_mlp(config, settings["num_passages"], tokens)

    def _join(self, shape: AttentionShape, layers: Sequence[int]) -> None:
        ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        self.bank = ExpertBank(shape, layers, *ranks)
        for number in layers:
            # With pipeline parallelism, a layer may be in another process.
            if not isinstance(layer := self.model.layers[number], PPMissingLayer):  # type: ignore[attr-defined]
                join_experts(layer, number, self.bank)

    def _branch_beside_mlp(self, config: HypernetworkConfig, num_passages: int, tokens: int) -> None:
        self.branch_name = f"model.layers.{config.layer}.mlp.genpoe"
        layer = self.model.layers[config.layer]  # type: ignore[attr-defined]
        self._has_branch = not isinstance(layer, PPMissingLayer)
        if self._has_branch:
            layer.mlp.genpoe = Branch(config, num_passages, tokens, self.branch_name)
            # Changing the class instead of wrapping keeps the names of the MLP's weights.
            layer.mlp.__class__ = _with_branch(type(layer.mlp))

    @property
    def branch(self) -> Branch:
        """The branch, in the process that has its layer."""
        return self.get_submodule(self.branch_name)  # type: ignore[attr-defined]

    def carrier_path(self, name: str) -> str:
        """The name in this model of the layer that holds a part of expert sets."""
        return f"genpoe.{name}" if name == START else f"{self.branch_name}.{name}"

    def forward(self, input_ids: Tensor | None, positions: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._needs_cpu_fix:
            fix_cpu_lora(self)  # type: ignore[arg-type]
            self._needs_cpu_fix = False
        if self.bank is not None:
            slots = self.genpoe.slots(len(positions))
            if slots is not None:
                self.bank.begin(self.genpoe(positions), slots)
        if self._has_branch:
            # Here and not in the layer: the layer has no positions, and this code is outside of the compiled part.
            self.branch.set_active(self.genpoe(positions))
        return super().forward(input_ids, positions, *args, **kwargs)  # type: ignore[misc]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        loaded = super().load_weights(weights)  # type: ignore[misc]
        if self._has_branch:
            if self.branch.factored:
                with safe_open(resolve_checkpoint(self._hypernetwork) / WEIGHTS, framework="pt") as file:
                    self.branch.load((name, file.get_tensor(f"head.{name}")) for name in Factors._fields)
            loaded |= {f"{self.branch_name}.{name}" for name, _ in self.branch.named_parameters()}
        return loaded | {f"genpoe.{name}" for name, _ in self.genpoe.named_parameters()}


class GenPoELlamaForCausalLM(WithExperts, LlamaForCausalLM):
    pass


class GenPoEQwen2ForCausalLM(WithExperts, Qwen2ForCausalLM):
    pass


class GenPoEQwen3ForCausalLM(WithExperts, Qwen3ForCausalLM):
    pass


class GenPoEMistralForCausalLM(WithExperts, MistralForCausalLM):
    pass


class GenPoEGemmaForCausalLM(WithExperts, GemmaForCausalLM):
    pass


class GenPoEGemma2ForCausalLM(WithExperts, Gemma2ForCausalLM):
    pass


class GenPoEGemma3ForCausalLM(WithExperts, Gemma3ForCausalLM):
    pass
