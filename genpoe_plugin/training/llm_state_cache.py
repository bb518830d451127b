"""A cache of the frozen LLM's states of passages during training, because computing them takes most of a step's time.

States are cached in memory within a budget (the least recently used are dropped first), and optionally in a folder.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from genpoe_plugin.checkpoints.checkpoint import llm_identity, tokenizer_fingerprint
from genpoe_plugin.experts.config import HypernetworkConfig
from genpoe_plugin.experts.expert_files import ExpertFiles
from genpoe_plugin.experts.generator import ExpertGenerator
from genpoe_plugin.experts.hypernetwork import Hypernetwork
from genpoe_plugin.llm.language_model import weights_sample
from genpoe_plugin.training.training_arguments import HypernetworkTraining

DEFAULT_STATE_BYTES = 4 * 10**9


def caches_states(config: HypernetworkConfig, arguments: HypernetworkTraining, examples: int) -> bool:
    """Whether a training reads passages more than once, and needs LLM states of them."""
    reads = config.head == "attention" or config.states == "contextual"
    return reads and arguments.steps(examples, 1) * arguments.batch_size > examples


def state_files(
    folder: str | Path, config: HypernetworkConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> ExpertFiles:
    """The files in ``folder`` with states for later runs, specific to this LLM, tokenizer and configuration."""
    read = {name: getattr(config, name) for name in ("head", "states", "layers", "kv_heads", "reads_states", "layout")}
    facts = [llm_identity(model), weights_sample(model), str(model.dtype), tokenizer_fingerprint(tokenizer), read]
    return ExpertFiles(folder, f"states-{sha256(json.dumps(facts).encode()).hexdigest()[:16]}")


class CachingGenerator(ExpertGenerator):
    """An `ExpertGenerator` that caches the LLM's states of passages.

    Args:
        hypernetwork, model, tokenizer: as in `ExpertGenerator`.
        max_bytes: budget for states in memory.
        files: files to read states of earlier runs from, and to write new ones to.
    """

    def __init__(
        self,
        hypernetwork: Hypernetwork,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_bytes: int = DEFAULT_STATE_BYTES,
        files: ExpertFiles | None = None,
    ) -> None:
        super().__init__(hypernetwork, model, tokenizer)
        self.max_bytes, self.files = max_bytes, files
        self._cache: OrderedDict[str, Tensor] = OrderedDict()
        self._bytes = 0

    def embed(self, passages: Sequence[str]) -> tuple[Tensor, Tensor]:
        """As `ExpertGenerator.embed`, but without tokens that are not part of the passages."""
        if not (self.attention or self.contextual):  # embeddings are only looked up
            return super().embed(passages)
        states = self._states(list(dict.fromkeys(passages)))
        rows = [states[passage] for passage in passages]
        mask = pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in rows], batch_first=True)
        return pad_sequence(rows, batch_first=True).to(self.device), mask.to(self.device)

    def _states(self, unique: Sequence[str]) -> dict[str, Tensor]:
        """The states of each passage, ``[tokens, ...]``, on the CPU."""
        states_of = {}
        for passage in unique:
            if passage in self._cache:
                self._cache.move_to_end(passage)
                states_of[passage] = self._cache[passage]
            elif self.files is not None and passage in self.files:
                (states_of[passage],) = self.files.read([passage])
            else:
                # Read alone and in the LLM's own precision. In a batch, or in a bfloat16 step, rounding would differ,
                # and a resumed run reads the passage at another time.
                with torch.autocast(self.device.type, enabled=False):
                    states, mask = super().embed([passage])
                states_of[passage] = tokens = states[mask].cpu()
                if self.files is not None:
                    self.files.write([passage], (tokens,), [len(tokens)])
            self._cache_states(passage, states_of[passage])
        return states_of

    def _cache_states(self, passage: str, states: Tensor) -> None:
        if passage in self._cache:
            return
        self._cache[passage] = states
        self._bytes += states.nbytes
        while self._bytes > self.max_bytes:
            _, oldest = self._cache.popitem(last=False)
            self._bytes -= oldest.nbytes
