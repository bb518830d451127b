"""The store of experts: each unique passage becomes an expert once and is cached while there is room."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from genpoe_plugin.errors import InputError
from genpoe_plugin.experts.attention import AttentionExperts
from genpoe_plugin.experts.expert import Experts, MLPExperts, Weights
from genpoe_plugin.experts.expert_files import ExpertFiles
from genpoe_plugin.experts.footprint import footprint
from genpoe_plugin.experts.generator import ExpertGenerator
from genpoe_plugin.experts.hypernetwork import Hypernetwork
from genpoe_plugin.experts.injection import RowExperts, unit_rows
from genpoe_plugin.experts.int8 import Int8Experts
from genpoe_plugin.experts.store_options import ON_DEVICE, ON_HOST
from genpoe_plugin.experts.unit_pool import UnitPool
from genpoe_plugin.prompts import MAX_PASSAGE_TOKENS

MAX_EXPERT_UNITS = 2 * MAX_PASSAGE_TOKENS  # units of one expert in the attention, including text of the prompt layout


class ExpertStore:
    """A cache of experts within a budget of bytes; the least recently used experts are dropped first.

    Args:
        hypernetwork: generates missing experts; on the device of the LLM's embeddings.
        model, tokenizer: the LLM that the experts are for. The part of it that the hypernetwork reads is enough.
        dtype: dtype of the experts; the LLM's by default. With ``torch.int8``, experts in the attention are stored in
            eight bits and returned in the LLM's dtype.
        device_bytes: budget for experts on the device of the LLM; shared tensors are not counted.
        host_bytes: budget for further experts in the host's memory, if the LLM is on an accelerator.
        files: folder to read experts of earlier runs from, and to write new ones to.
        batch_size: passages per generation step; by default as many as memory allows.

    Raises:
        InputError: ``torch.int8`` with experts beside an MLP, or an LLM that does not match the hypernetwork.
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
            raise InputError("experts beside an MLP cannot be stored in int8; experts in the attention can")
        self.config = config
        self.tokenizer = tokenizer
        self.layers = config.layers
        self._generator = ExpertGenerator(hypernetwork, model, tokenizer)
        self._files = files
        self._batch_size = batch_size
        device = self._generator.device
        self._form: Experts = hypernetwork.none().to(self.dtype)
        unit_bytes = footprint(config, self.dtype).expert_bytes
        if self._int8:
            assert isinstance(self._form, AttentionExperts)
            self._form = Int8Experts.of(self._form)
            unit_bytes = self._form.unit_bytes
        self._unit_bytes = unit_bytes
        form = self._form.weights
        min_units = MAX_EXPERT_UNITS if config.head == "attention" else 1
        self._units: dict[str, int] = {}
        self._device_pool = UnitPool(max(min_units, device_bytes // unit_bytes), form, device)
        self._host_pool = UnitPool(0 if device.type == "cpu" else host_bytes // unit_bytes, form, torch.device("cpu"))

    @property
    def batch_size(self) -> int:
        """Passages per generation step."""
        if self._batch_size is None:
            self._batch_size = self._generator.batch_size()
        return self._batch_size

    def prepare(self, passages: Iterable[str], *, progress: bool = True) -> None:
        """Generate or load the experts of ``passages`` ahead of their use, as many as the budget holds.

        Args:
            passages: passage strings; duplicates are ignored.
            progress: whether to show a progress bar.
        """
        fitting = self._that_fit(list(dict.fromkeys(passages)))
        # Mark cached experts as used first, or making room for the others might drop them.
        self._host_pool.use(fitting)
        self._device_pool.use(fitting)
        missing = [
            passage for passage in fitting if passage not in self._device_pool and passage not in self._host_pool
        ]
        missing.sort(key=len)  # less padding
        with tqdm(total=len(missing), desc="Generating experts", disable=not progress or not missing) as bar:
            self._device_pool.reserve(self._device_pool.used + sum(self.units(missing)))
            for batch in self._load(missing):
                bar.update(len(batch))

    def experts(self, passages: Sequence[Sequence[str]]) -> list[Experts]:
        """The experts of several groups of passages, each with one leading dimension: the units of the group."""
        unique = list(dict.fromkeys(passage for group in passages for passage in group))
        weights, unique_slots = self._fetch(unique)
        slots_of = dict(zip(unique, unique_slots, strict=True))
        groups: list[Experts] = []
        for group in passages:
            slots = [slot for passage in group for slot in slots_of[passage]]
            index = torch.tensor(slots, device=self._generator.device)
            groups.append(self._form.with_weights(*(weight[index] for weight in weights)))
        return groups

    def rows(
        self, passages: Sequence[Sequence[str]], gates: Sequence[Sequence[float]], start: Sequence[int]
    ) -> RowExperts | None:
        """The experts of one batch.

        Args:
            passages: the passages of each row, any number per row.
            gates: one gate per passage of each row.
            start: for each row, the first position that its experts act on.

        Returns:
            Experts ``[served, K]``, with K the largest number of passages of a row (of units for experts in the
            attention); None if no row has passages. Padding of shorter rows has gate 0, and is zero beside an MLP.
        """
        served = [number for number, row in enumerate(passages) if row]
        if not served:
            return None
        unique = list(dict.fromkeys(passage for row in passages for passage in row))
        weights, unique_slots = self._fetch(unique)
        slots_of = dict(zip(unique, unique_slots, strict=True))
        index, gate, padding = unit_rows([passages[row] for row in served], [gates[row] for row in served], slots_of)
        device = self._generator.device
        experts = self._form.select(weights, index.to(device))
        if isinstance(experts, MLPExperts) and padding.any():
            for weight in experts.weights:  # an expert of zeros outputs zero for every input
                weight[padding.to(device)] = 0
        return RowExperts(
            experts,
            gate.to(device),
            torch.tensor(list(start), device=device),
            None if len(served) == len(passages) else torch.tensor(served, device=device),
        )

    def units(self, passages: Sequence[str]) -> list[int]:
        """The number of units of each passage's expert."""
        if new := [passage for passage in passages if passage not in self._units]:
            self._units.update(zip(new, self._generator.units(new), strict=True))
        return [self._units[passage] for passage in passages]

    def nbytes(self, passages: Sequence[str]) -> int:
        """The bytes of the experts of ``passages``, as stored; shared tensors are not counted."""
        return self._unit_bytes * sum(self.units(passages))

    def _that_fit(self, passages: Sequence[str]) -> list[str]:
        """The longest prefix of ``passages`` whose experts fit the budget."""
        room, fitting = self._device_pool.capacity + self._host_pool.capacity, []
        for passage, units in zip(passages, self.units(passages), strict=True):
            room -= units
            if room < 0:
                break
            fitting.append(passage)
        return fitting

    def _fetch(self, unique: Sequence[str]) -> tuple[Weights, list[list[int]]]:
        """Tensors with the units of distinct passages, and the slots of each passage in them."""
        self._device_pool.use(unique)
        cached = [passage for passage in unique if passage in self._device_pool]
        missing = [passage for passage in unique if passage not in self._device_pool]
        if sum(self.units(unique)) <= self._device_pool.capacity:
            for _ in self._load(missing):
                pass
            self._device_pool.use(unique)
            return self._device_pool.weights, self._device_pool.slots(unique)
        # More than the budget holds: join copies for this call only.
        parts = [(cached, self._device_pool.select(cached))] if cached else []
        parts += [(batch, self._device_pool.select(batch)) for batch in self._load(missing)]
        names = [passage for batch, _ in parts for passage in batch]
        slots_of, first = {}, 0
        for passage, units in zip(names, self.units(names), strict=True):
            slots_of[passage] = list(range(first, first + units))
            first += units
        columns = zip(*(weights for _, weights in parts), strict=True)
        return tuple(map(torch.cat, columns)), [slots_of[passage] for passage in unique]

    def _batches(self, passages: Sequence[str]) -> Iterator[list[str]]:
        """Batches of at most `batch_size` passages, with no more units than the device's budget."""
        batch: list[str] = []
        room = self._device_pool.capacity
        for passage, units in zip(passages, self.units(passages), strict=True):
            if batch and (len(batch) == self.batch_size or units > room):
                yield batch
                batch, room = [], self._device_pool.capacity
            batch.append(passage)
            room -= units
        if batch:
            yield batch

    def _load(self, passages: Sequence[str]) -> Iterator[list[str]]:
        """Put the experts of distinct passages on the device and yield the passages in batches.

        Experts come from the host's memory, else from files, else they are generated. A batch stays on the device at
        least until the next one is requested.
        """
        device = self._generator.device
        for batch in self._batches(passages):
            rest = batch
            if on_host := [passage for passage in rest if passage in self._host_pool]:
                self._put(on_host, tuple(weight.to(device) for weight in self._host_pool.select(on_host)))
                rest = [passage for passage in rest if passage not in self._device_pool]
            if self._files is not None and (on_disk := [passage for passage in rest if passage in self._files]):
                self._put(on_disk, self._read(self._files, on_disk))
                rest = [passage for passage in rest if passage not in self._device_pool]
            if rest:
                self._generate(rest)
            yield batch

    def _generate(self, passages: list[str]) -> None:
        units = self.units(passages)
        self._spill(sum(units))
        with self._device_pool.filling(passages, units) as slots, torch.inference_mode():
            if self._int8:
                experts, _ = self._generator.generate_units(passages)
                assert isinstance(experts, AttentionExperts)
                for target, weight in zip(self._device_pool.weights, Int8Experts.of(experts).weights, strict=True):
                    target.index_copy_(0, slots, weight)
            else:
                self._generator.write(passages, self._device_pool.weights, slots)
        if self._files is not None:
            self._files.write(passages, self._device_pool.select(passages), units)

    def _read(self, files: ExpertFiles, passages: list[str]) -> Weights:
        """Read experts from files, and check that they have the units and shapes of this hypernetwork's experts."""
        weights, units = files.read(passages), sum(self.units(passages))
        expected = [(units, *weight.shape[1:]) for weight in self._form.weights]
        if [tuple(weight.shape) for weight in weights] != expected:
            raise InputError(f"{files.folder}: experts of another shape than this hypernetwork's; delete the folder")
        return weights

    def _put(self, passages: list[str], weights: Weights) -> None:
        units = self.units(passages)
        self._spill(sum(units))
        self._device_pool.put(passages, weights, units)

    def _spill(self, units: int) -> None:
        """Copy the experts that ``units`` new units will evict from the device to the host's memory."""
        if not self._host_pool.capacity:
            return
        if evicted := [name for name in self._device_pool.oldest(units) if name not in self._host_pool]:
            self._host_pool.put(evicted, self._device_pool.select(evicted), self.units(evicted))
