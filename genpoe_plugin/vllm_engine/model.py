"""vLLM's models with the branch beside one MLP, by one mixin for all families."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from safetensors import safe_open
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.models.gemma import GemmaForCausalLM
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.model_executor.models.utils import PPMissingLayer
from vllm.platforms import current_platform

from genpoe_plugin.checkpoints.checkpoint import WEIGHTS, resolve_checkpoint
from genpoe_plugin.experts.config import HypernetworkConfig
from genpoe_plugin.experts.expert import Factors
from genpoe_plugin.vllm_engine.branch import Branch, Start
from genpoe_plugin.vllm_engine.cpu_lora import mend
from genpoe_plugin.vllm_engine.expert_sets import START


def _with_branch(mlp: Any) -> Any:
    """An MLP class whose output has that of a module ``genpoe`` added."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return mlp.forward(self, x) + self.genpoe(x)

    return type(f"{mlp.__name__}WithBranch", (mlp,), {"forward": forward})


class WithExperts:
    """Puts the branch into a vLLM model.

    What it has to know is in ``hf_config.genpoe``: ``hypernetwork`` (directory or hub id, on every node),
    ``config`` (of the hypernetwork) and ``num_passages``.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **options: Any) -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, **options)  # type: ignore[call-arg]
        settings = vllm_config.model_config.hf_config.genpoe
        config = HypernetworkConfig.from_dict(settings["config"])
        self._hypernetwork = settings["hypernetwork"]
        self.branch_name = f"model.layers.{config.layer}.mlp.genpoe"
        layer = self.model.layers[config.layer]  # type: ignore[attr-defined]
        # With pipeline parallelism the layer may be another process's.
        self._has_branch = not isinstance(layer, PPMissingLayer)
        self._mended = not current_platform.is_cpu()
        captured = vllm_config.compilation_config.max_cudagraph_capture_size or 0
        tokens = max(vllm_config.scheduler_config.max_num_batched_tokens, captured)
        # In every process, for vLLM cannot start one that adapters have nothing to do with.
        self.genpoe = Start(tokens)
        if self._has_branch:
            layer.mlp.genpoe = Branch(config, settings["num_passages"], tokens, self.branch_name)
            # The names of the MLP's weights must stay, so it changes its class and is not wrapped.
            layer.mlp.__class__ = _with_branch(type(layer.mlp))

    @property
    def branch(self) -> Branch:
        return self.get_submodule(self.branch_name)  # type: ignore[attr-defined]

    def carrier_path(self, name: str) -> str:
        """The name in this model of the layer that carries a part of expert sets."""
        return f"genpoe.{name}" if name == START else f"{self.branch_name}.{name}"

    def forward(self, input_ids: Tensor | None, positions: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self._mended:
            mend(self)  # type: ignore[arg-type]
            self._mended = True
        if self._has_branch:
            # Here and not in the layer, which has no positions, and outside of what is compiled.
            self.branch.note(self.genpoe(positions))
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
