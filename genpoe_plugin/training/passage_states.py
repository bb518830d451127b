"""What the frozen LLM makes of passages, kept over a training: it never changes, and is most of a step's work.

States are kept in memory within a budget, the least recently used go first, and in a folder if there is one.
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
from genpoe_plugin.training.arguments import HypernetworkTraining

IN_MEMORY = 4 * 10**9  # bytes, where nothing else is said


def keeps_states(config: HypernetworkConfig, arguments: HypernetworkTraining, examples: int) -> bool:
    """Whether passages come again in a training, and there is something of them to keep."""
    reads = config.head == "attention" or config.states == "contextual"
    return reads and arguments.steps(examples, 1) * arguments.batch_size > examples


def state_files(
    folder: str | Path, config: HypernetworkConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> ExpertFiles:
    """Where states are kept for later runs: of this LLM and tokenizer, and of what ``config`` reads of them."""
    read = {name: getattr(config, name) for name in ("head", "states", "layers", "kv_heads", "reads_states", "layout")}
    facts = [llm_identity(model), weights_sample(model), str(model.dtype), tokenizer_fingerprint(tokenizer), read]
    return ExpertFiles(folder, f"states-{sha256(json.dumps(facts).encode()).hexdigest()[:16]}")


class KeepingGenerator(ExpertGenerator):
    """An `ExpertGenerator` that reads every passage once.

    Args:
        most_bytes: of the states in memory.
        files: where states of earlier runs are, and those of this one go.
    """

    def __init__(
        self,
        hypernetwork: Hypernetwork,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        most_bytes: int = IN_MEMORY,
        files: ExpertFiles | None = None,
    ) -> None:
        super().__init__(hypernetwork, model, tokenizer)
        self.most_bytes, self.files = most_bytes, files
        self._kept: OrderedDict[str, Tensor] = OrderedDict()
        self._bytes = 0

    def embed(self, passages: Sequence[str]) -> tuple[Tensor, Tensor]:
        """As `ExpertGenerator.embed`, without the tokens that are not of the passages."""
        if not (self.attention or self.contextual):  # then states are looked up in the embeddings
            return super().embed(passages)
        found = self._states(list(dict.fromkeys(passages)))
        rows = [found[passage] for passage in passages]
        mask = pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in rows], batch_first=True)
        return pad_sequence(rows, batch_first=True).to(self.device), mask.to(self.device)

    def _states(self, unique: Sequence[str]) -> dict[str, Tensor]:
        """``[tokens, ...]`` for each passage, on the CPU."""
        found = {}
        for passage in unique:
            if passage in self._kept:
                self._kept.move_to_end(passage)
                found[passage] = self._kept[passage]
            elif self.files is not None and passage in self.files:
                (found[passage],) = self.files.read([passage])
            else:
                # By itself, and in the LLM's own precision: among others, or in a step of a training in bfloat16, it
                # would be rounded otherwise, and a resumed run reads it at another time.
                with torch.autocast(self.device.type, enabled=False):
                    states, mask = super().embed([passage])
                found[passage] = own = states[mask].cpu()
                if self.files is not None:
                    self.files.write([passage], (own,), [len(own)])
            self._keep(passage, found[passage])
        return found

    def _keep(self, passage: str, states: Tensor) -> None:
        if passage in self._kept:
            return
        self._kept[passage] = states
        self._bytes += states.nbytes
        while self._bytes > self.most_bytes:
            _, oldest = self._kept.popitem(last=False)
            self._bytes -= oldest.nbytes
