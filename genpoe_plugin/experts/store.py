"""Passages in, experts out: each unique passage becomes an expert once and is kept while there is room."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from genpoe_plugin.errors import InputError
from genpoe_plugin.experts.attention import AttentionExperts
from genpoe_plugin.experts.expert import Experts, MLPExperts, Weights
from genpoe_plugin.experts.files import ExpertFiles
from genpoe_plugin.experts.footprint import footprint
from genpoe_plugin.experts.generator import ExpertGenerator
from genpoe_plugin.experts.hypernetwork import Hypernetwork
from genpoe_plugin.experts.injection import RowExperts
from genpoe_plugin.experts.int8 import Int8Experts
from genpoe_plugin.experts.keeping import ON_DEVICE, ON_HOST
from genpoe_plugin.experts.slab import Slab
from genpoe_plugin.prompts import MAX_PASSAGE_TOKENS

MAX_EXPERT_UNITS = 2 * MAX_PASSAGE_TOKENS  # of one expert in the attention, what the prompt puts around it included


class ExpertStore:
    """Experts of passages in the LLM's dtype, least recently used ones dropped beyond a byte budget.

    Args:
        hypernetwork: generates what the store lacks; on the device of the LLM's embeddings.
        model, tokenizer: the LLM that the experts are for; of it, what the hypernetwork reads passages with is enough.
        dtype: of the experts; without it, the LLM's. In ``torch.int8`` those in the attention are kept in eight bits,
            and given back in the LLM's dtype.
        device_bytes: budget for the experts kept beside the LLM; what all of them share is there once and not counted.
        host_bytes: budget for those that are in memory beyond it, where the LLM is on an accelerator.
        files: where experts of earlier runs are, and those of this one go.
        batch_size: passages a generation step; as memory allows without it.
    """

    def __init__(
        self,
        hypernetwork: Hypernetwork,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        dtype: torch.dtype | None = None,
        device_bytes: int = ON_DEVICE,
        host_bytes: int = ON_HOST,
        files: ExpertFiles | None = None,
        batch_size: int | None = None,
    ) -> None:
        self.dtype = model.dtype if dtype in (None, torch.int8) else dtype
        self._int8 = dtype == torch.int8
        hypernetwork.lower_head(self.dtype)
        config = hypernetwork.config
        if self._int8 and config.head != "attention":
            raise InputError("experts beside an MLP cannot be kept in int8; those in the attention can")
        self.config = config
        self.tokenizer = tokenizer
        self.layers = config.layers
        self._generator = ExpertGenerator(hypernetwork, model, tokenizer)
        self._files = files
        self._batch_size = batch_size
        device = self._generator.device
        self._form: Experts = hypernetwork.none().to(self.dtype)
        one = footprint(config, self.dtype).expert_bytes
        if self._int8:
            assert isinstance(self._form, AttentionExperts)
            self._form = Int8Experts.of(self._form)
            one = self._form.unit_bytes
        form = self._form.weights
        least = MAX_EXPERT_UNITS if config.head == "attention" else 1
        self._units: dict[str, int] = {}
        self._slab = Slab(max(least, device_bytes // one), form, device)
        self._host = Slab(0 if device.type == "cpu" else host_bytes // one, form, torch.device("cpu"))

    @property
    def batch_size(self) -> int:
        """Passages a generation step."""
        if self._batch_size is None:
            self._batch_size = self._generator.batch_size()
        return self._batch_size

    def prepare(self, passages: Iterable[str], *, progress: bool = True) -> None:
        """Make the experts of ``passages`` ready ahead of their use, as many as the budget holds."""
        wanted = self._that_fit(list(dict.fromkeys(passages)))
        # What is there already counts as used, or making room for the rest might drop it.
        self._host.use(wanted)
        self._slab.use(wanted)
        missing = [passage for passage in wanted if passage not in self._slab and passage not in self._host]
        missing.sort(key=len)  # for tight batches
        with tqdm(total=len(missing), desc="Generating experts", disable=not progress or not missing) as bar:
            self._slab.reserve(self._slab.used + sum(self.units(missing)))
            for batch in self._bring(missing):
                bar.update(len(batch))

    def experts(self, passages: Sequence[Sequence[str]]) -> list[Experts]:
        """The experts of each of several groups of passages, with one leading dimension: the units of the group."""
        unique = list(dict.fromkeys(passage for group in passages for passage in group))
        weights, places = self._fetch(unique)
        place = dict(zip(unique, places, strict=True))
        found: list[Experts] = []
        for group in passages:
            slots = [slot for passage in group for slot in place[passage]]
            index = torch.tensor(slots, device=self._generator.device)
            found.append(self._form.with_weights(*(weight[index] for weight in weights)))
        return found

    def rows(
        self, passages: Sequence[Sequence[str]], gates: Sequence[Sequence[float]], start: Sequence[int]
    ) -> RowExperts | None:
        """The experts of one batch.

        Args:
            passages: the passages of each row, any number of them.
            gates: a gate for each passage of each row.
            start: for each row the first position that its experts act on.

        Returns:
            Experts ``[served, K]`` with K the largest number of passages (of units with experts in the attention), or
            None if no row has any. Where a row has fewer, those beside an MLP are zeros, and all have a gate of 0.
        """
        served = [number for number, row in enumerate(passages) if row]
        if not served:
            return None
        unique = list(dict.fromkeys(passage for row in passages for passage in row))
        weights, places = self._fetch(unique)
        place = dict(zip(unique, places, strict=True))
        slots = [[slot for passage in passages[row] for slot in place[passage]] for row in served]
        gated = [
            [gate for passage, gate in zip(passages[row], gates[row], strict=True) for _ in place[passage]]
            for row in served
        ]
        most = max(map(len, slots))
        index = torch.zeros(len(served), most, dtype=torch.long)
        gate = torch.zeros(len(served), most)
        none = torch.ones(len(served), most, dtype=torch.bool)
        for number, (own, own_gates) in enumerate(zip(slots, gated, strict=True)):
            index[number] = own[0]  # beyond its own units any finite ones, without a gate
            index[number, : len(own)] = torch.tensor(own)
            gate[number, : len(own)] = torch.tensor(own_gates, dtype=torch.float32)
            none[number, : len(own)] = False
        device = self._generator.device
        experts = self._form.select(weights, index.to(device))
        if isinstance(experts, MLPExperts) and none.any():
            for weight in experts.weights:  # experts of zeros add nothing whatever they are fed
                weight[none.to(device)] = 0
        return RowExperts(
            experts,
            gate.to(device),
            torch.tensor(list(start), device=device),
            None if len(served) == len(passages) else torch.tensor(served, device=device),
        )

    def units(self, passages: Sequence[str]) -> list[int]:
        """How many units the expert of each passage has."""
        if new := [passage for passage in passages if passage not in self._units]:
            self._units.update(zip(new, self._generator.units(new), strict=True))
        return [self._units[passage] for passage in passages]

    def _that_fit(self, passages: Sequence[str]) -> list[str]:
        """As many of the first passages as the budget holds."""
        room, fitting = self._slab.capacity + self._host.capacity, []
        for passage, units in zip(passages, self.units(passages), strict=True):
            room -= units
            if room < 0:
                break
            fitting.append(passage)
        return fitting

    def _fetch(self, unique: Sequence[str]) -> tuple[Weights, list[list[int]]]:
        """Tensors with the units of distinct passages' experts, and where in them those of each are."""
        self._slab.use(unique)
        kept = [passage for passage in unique if passage in self._slab]
        missing = [passage for passage in unique if passage not in self._slab]
        if sum(self.units(unique)) <= self._slab.capacity:
            for _ in self._bring(missing):
                pass
            self._slab.use(unique)
            return self._slab.weights, self._slab.slots(unique)
        # More than the budget keeps: they are put together for this once.
        parts = [(kept, self._slab.select(kept))] if kept else []
        parts += [(batch, self._slab.select(batch)) for batch in self._bring(missing)]
        names = [passage for batch, _ in parts for passage in batch]
        place, first = {}, 0
        for passage, units in zip(names, self.units(names), strict=True):
            place[passage] = list(range(first, first + units))
            first += units
        columns = zip(*(weights for _, weights in parts), strict=True)
        return tuple(map(torch.cat, columns)), [place[passage] for passage in unique]

    def _batches(self, passages: Sequence[str]) -> Iterator[list[str]]:
        """At most `batch_size` passages at a time, and no more units than the device's budget."""
        batch: list[str] = []
        room = self._slab.capacity
        for passage, units in zip(passages, self.units(passages), strict=True):
            if batch and (len(batch) == self.batch_size or units > room):
                yield batch
                batch, room = [], self._slab.capacity
            batch.append(passage)
            room -= units
        if batch:
            yield batch

    def _bring(self, passages: Sequence[str]) -> Iterator[list[str]]:
        """Put the experts of distinct passages on the device, from wherever they come soonest; yield them by batches.

        A batch is there until the next one is asked for.
        """
        device = self._generator.device
        for batch in self._batches(passages):
            rest = batch
            if on_host := [passage for passage in rest if passage in self._host]:
                self._keep(on_host, tuple(weight.to(device) for weight in self._host.select(on_host)))
                rest = [passage for passage in rest if passage not in self._slab]
            if self._files is not None and (on_disk := [passage for passage in rest if passage in self._files]):
                self._keep(on_disk, self._files.read(on_disk))
                rest = [passage for passage in rest if passage not in self._slab]
            if rest:
                self._generate(rest)
            yield batch

    def _generate(self, passages: list[str]) -> None:
        units = self.units(passages)
        self._spill(sum(units))
        with self._slab.filling(passages, units) as slots, torch.inference_mode():
            if self._int8:
                experts, _ = self._generator.generate_units(passages)
                assert isinstance(experts, AttentionExperts)
                for kept, weight in zip(self._slab.weights, Int8Experts.of(experts).weights, strict=True):
                    kept.index_copy_(0, slots, weight)
            else:
                self._generator.write(passages, self._slab.weights, slots)
        if self._files is not None:
            self._files.write(passages, self._slab.select(passages), units)

    def _keep(self, passages: list[str], weights: Weights) -> None:
        units = self.units(passages)
        self._spill(sum(units))
        self._slab.put(passages, weights, units)

    def _spill(self, units: int) -> None:
        """What has no room on the device once so many others come goes to the host."""
        if self._host.capacity and (leaving := [name for name in self._slab.oldest(units) if name not in self._host]):
            self._host.put(leaving, self._slab.select(leaving), self.units(leaving))
