"""An extension of vLLM's workers that loads expert sets from memory instead of files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from safetensors.torch import load
from torch import Tensor
from vllm.distributed.parallel_state import get_pp_group
from vllm.forward_context import get_forward_context
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights

from genpoe_plugin.experts.attention import QueryAddition
from genpoe_plugin.vllm_engine.attention import Batch, ExpertBank
from genpoe_plugin.vllm_engine.expert_sets import GATES, SHARED, UNITS, adapters


class ExpertWorker:
    """Methods that vLLM adds to each of its workers (``worker_extension_cls``)."""

    model_runner: Any

    def genpoe_prepare(self) -> None:
        """Create the buffer for the output of the previous pipeline stage.

        vLLM 0.32 on CPUs creates it in a trial pass, which it leaves out with ``enforce_eager``.
        """
        runner = self.model_runner
        if not get_pp_group().is_first_rank and runner.intermediate_tensors is None:
            runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
                batch_size=runner.max_num_tokens, dtype=runner.model_config.dtype, device=runner.device
            )

    def genpoe_exchange(self, removed: Sequence[int], added: bytes) -> None:
        """Unload some expert sets and load others.

        Args:
            removed: numbers of sets to unload.
            added: sets to load, as safetensors; a tensor's name is the number of the set, a slash, and its name in
                `expert_set`. The number `SHARED` is for what all sets share, from `shared_parts`.
        """
        manager = self.model_runner.lora_manager
        for number in removed:
            manager.remove_adapter(number)
        sets: defaultdict[int, dict[str, Tensor]] = defaultdict(dict)
        for name, part in load(added).items():
            owner, _, part_name = name.partition("/")
            sets[int(owner)][part_name] = part
        shared = sets.pop(SHARED, {})
        bank = self.model_runner.get_model().bank
        if bank is not None:
            bank.set_of_slot = lambda: manager._adapter_manager.lora_index_to_id
            bank.batch = lambda: _current_batch(self.model_runner)
            bank.keep(list(manager.list_adapters()))
            device, dtype = self.model_runner.device, self.model_runner.dtype
            if shared:
                _share(bank, {name: part.to(device) for name, part in shared.items()})
        for number, parts in sets.items():
            if bank is not None:
                units, gates = (parts.pop(name).to(device) for name in (UNITS, GATES))
                bank.add(number, units, gates, dtype)
            layers = {}
            for name, (a, b) in adapters(parts).items():
                path = self.model_runner.get_model().carrier_path(name)
                layers[path] = LoRALayerWeights(path, a.shape[0], a.shape[0], a, b)
            rank = max(layer.rank for layer in layers.values())
            # vLLM's own `add_adapter` reads files.
            manager._adapter_manager.add_adapter(LoRAModel(number, rank, layers))


def _share(bank: ExpertBank, parts: dict[str, Tensor]) -> None:
    """Give the bank what `shared_parts` made."""
    count = sum(name.startswith("read") for name in parts)
    bank.share(parts["bias"], [QueryAddition(parts[f"read{n}"], parts[f"write{n}"]) for n in range(count)])


def _current_batch(runner: Any) -> Batch | None:
    """The batch of the current forward pass; None in a trial pass, which has no requests.

    It comes from the runner, because attention metadata differ between backends.
    """
    context = get_forward_context()
    if context.attn_metadata is None:
        return None
    batch = runner.input_batch
    count = batch.num_reqs
    starts = runner.query_start_loc.np[: count + 1]
    tables: dict[str, Tensor] = {}
    block_sizes: dict[str, int] = {}
    for group, cached in enumerate(runner.kv_cache_config.kv_cache_groups):
        # A kernel's blocks may be smaller than those of the cache, so their size is that of this table.
        table = batch.block_table[group]
        tables |= dict.fromkeys(cached.layer_names, table.get_device_tensor(count))
        block_sizes |= dict.fromkeys(cached.layer_names, table.block_size)
    lengths = batch.num_computed_tokens_cpu[:count] + starts[1:] - starts[:-1]
    assert isinstance(context.slot_mapping, dict)
    return Batch(starts.tolist(), lengths.tolist(), context.slot_mapping, tables, block_sizes)
