"""Passages in, experts out: each unique passage becomes an expert once and is kept while there is room."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from genpoe_plugin.experts.expert import Experts
from genpoe_plugin.experts.footprint import footprint
from genpoe_plugin.experts.generator import ExpertGenerator
from genpoe_plugin.experts.hypernetwork import Hypernetwork
from genpoe_plugin.experts.injection import RowExperts


class ExpertStore:
    """Experts of passages in the LLM's dtype, least recently used ones dropped beyond a byte budget.

    Args:
        hypernetwork: generates what the store lacks; on the device of the LLM's embeddings.
        model, tokenizer: the LLM that the experts are for.
        capacity_bytes: budget for the experts kept; what all of them share is there once and not counted.
        batch_size: passages a generation step.
    """

    def __init__(
        self,
        hypernetwork: Hypernetwork,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        capacity_bytes: int = 2**31,
        batch_size: int = 64,
    ) -> None:
        config = hypernetwork.config
        self.config = config
        self.tokenizer = tokenizer
        self.layer = config.layer
        self.dtype = model.dtype
        self.batch_size = batch_size
        self.capacity = max(1, capacity_bytes // footprint(config, self.dtype).expert_bytes)
        self._generator = ExpertGenerator(hypernetwork, model, tokenizer)
        self._experts: OrderedDict[str, Experts] = OrderedDict()
        self._form: Experts | None = None

    def prepare(self, passages: Iterable[str], *, progress: bool = True) -> None:
        """Generate the experts of ``passages`` ahead of their use, as many as the budget holds."""
        wanted = list(dict.fromkeys(passages))[: self.capacity]
        # What is there already counts as used, or making room for the rest might drop it.
        self._fetch([passage for passage in wanted if passage in self._experts])
        missing = [passage for passage in wanted if passage not in self._experts]
        with tqdm(total=len(missing), desc="Generating experts", disable=not progress or not missing) as bar:
            for begin in range(0, len(missing), self.batch_size):
                bar.update(len(self._fetch(missing[begin : begin + self.batch_size])))

    def experts(self, passages: Sequence[Sequence[str]]) -> list[Experts]:
        """The experts of each of several groups of passages, with one leading dimension: that of the group."""
        unique = list(dict.fromkeys(passage for group in passages for passage in group))
        found = dict(zip(unique, self._fetch(unique), strict=True))
        return [Experts.stack([found[passage] for passage in group]) for group in passages]

    def rows(
        self, passages: Sequence[Sequence[str]], gates: Sequence[Sequence[float]], start: Sequence[int]
    ) -> RowExperts | None:
        """The experts of one batch.

        Args:
            passages: the passages of each row, any number of them.
            gates: a gate for each passage of each row.
            start: for each row the first position that its experts act on.

        Returns:
            Experts ``[rows, K]`` with K the largest number of passages, or None if no row has any.
        """
        most = max(map(len, passages), default=0)
        if most == 0:
            return None
        unique = list(dict.fromkeys(passage for row in passages for passage in row))
        experts = self._fetch(unique)
        # A row with fewer passages points at a last expert of zeros, which adds nothing whatever it is fed.
        experts.append(experts[0].map(torch.zeros_like))
        place = {passage: number for number, passage in enumerate(unique)}
        device = experts[0].weights[0].device
        index = torch.full((len(passages), most), len(unique), device=device)
        gate = torch.zeros(len(passages), most, device=device)
        for number, (row, row_gates) in enumerate(zip(passages, gates, strict=True)):
            index[number, : len(row)] = torch.tensor([place[passage] for passage in row], dtype=torch.long)
            gate[number, : len(row)] = torch.tensor(list(row_gates), dtype=torch.float32)
        return RowExperts(Experts.stack(experts)[index], gate, torch.tensor(list(start), device=device))

    def _fetch(self, unique: Sequence[str]) -> list[Experts]:
        """The experts of distinct passages in their order; what is missing is generated in batches."""
        found = {passage: self._experts[passage] for passage in unique if passage in self._experts}
        missing = [passage for passage in unique if passage not in found]
        for begin in range(0, len(missing), self.batch_size):
            batch = missing[begin : begin + self.batch_size]
            with torch.inference_mode():
                generated = self._generator.generate(batch).to(self.dtype)
            if self._form is None:
                self._form = generated.map(lambda weight: weight.new_empty(0))
            # What they share is that of the first batch, or each batch would keep a copy of its own. The rest is
            # cloned one by one: a view would keep the whole batch alive after its neighbours are dropped.
            for number, passage in enumerate(batch):
                found[passage] = self._form.with_weights(*(weight[number].clone() for weight in generated.weights))
        for passage in unique:
            self._experts[passage] = found[passage]
            self._experts.move_to_end(passage)
        while len(self._experts) > self.capacity:
            self._experts.popitem(last=False)
        return [found[passage] for passage in unique]
