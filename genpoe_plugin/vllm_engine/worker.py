"""An extension of vLLM's workers that loads expert sets from memory instead of files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from safetensors.torch import load
from torch import Tensor
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights

from genpoe_plugin.vllm_engine.expert_sets import adapters


class ExpertWorker:
    """Methods that vLLM adds to each of its workers (``worker_extension_cls``)."""

    model_runner: Any

    def genpoe_exchange(self, removed: Sequence[int], added: bytes) -> None:
        """Unload some expert sets and load others.

        Args:
            removed: numbers of sets to unload.
            added: sets to load, as safetensors; a tensor's name is the number of the set, a slash, and its name in
                `expert_set`.
        """
        manager = self.model_runner.lora_manager
        for number in removed:
            manager.remove_adapter(number)
        sets: defaultdict[int, dict[str, Tensor]] = defaultdict(dict)
        for name, part in load(added).items():
            owner, _, part_name = name.partition("/")
            sets[int(owner)][part_name] = part
        for number, parts in sets.items():
            layers = {}
            for name, (a, b) in adapters(parts).items():
                path = self.model_runner.get_model().carrier_path(name)
                layers[path] = LoRALayerWeights(path, a.shape[0], a.shape[0], a, b)
            rank = max(layer.rank for layer in layers.values())
            # vLLM's own `add_adapter` reads files.
            manager._adapter_manager.add_adapter(LoRAModel(number, rank, layers))
