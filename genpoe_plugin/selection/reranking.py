"""The reranker that is a decoder LLM, and the reranking of questions by any reranker."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from genpoe_plugin.data.questions import Question, by_rerank_score
from genpoe_plugin.errors import InputError
from genpoe_plugin.hub import commit_of, loaded_from, split_revision
from genpoe_plugin.llm.language_model import to_device
from genpoe_plugin.selection.recognition import SETTINGS_FILE, recognise
from genpoe_plugin.selection.reranker_format import BGE, QUERY, RerankerFormat

DEFAULT_PROMPT = BGE.prompt
# Number of pairs that are tokenised and sorted by length together: enough for batches with little padding, in bounded
# memory.
WINDOW = 4096


class Scorer(Protocol):
    """The interface of a reranker."""

    @property
    def fingerprint(self) -> str:
        """A hash of everything that decides a score."""

    @property
    def commit(self) -> str | None:
        """Commit of the hub repository that it was loaded from."""

    def score(self, pairs: Sequence[tuple[str, str]], *, progress: bool = False) -> np.ndarray:
        """The score of every (query, passage string) pair, float32 ``[n]``; higher is more relevant."""


@dataclass(frozen=True)
class EncodedPair:
    """The input of a (query, passage) pair.

    Attributes:
        ids: its token ids, unpadded.
        scored: number of tokens at its end whose log-likelihood is the score; 0 if logits are the score.
    """

    ids: list[int]
    scored: int


class Reranker:
    """Scores (query, passage) pairs by a decoder LLM: by logits at the last position, or by the query's likelihood.

    A `RerankerFormat` says how a pair is read and what the score is. A query in a piece of its own is cut at
    3/4 of the tokens that a query and a passage have together, so that some of the passage is always read. There is no
    BOS if the tokenizer has none or uses it for padding. In the format ``bge`` these are FlagEmbedding's rules, and in
    ``qwen3`` those of the model cards, so their rerankers keep their scores.

    Args:
        model: the decoder LLM, with a language-modelling head, or with a classification head of one label, whose
            output is then the score.
        tokenizer: the LLM's tokenizer.
        format: the format that the LLM was trained with.
        prompt: text in the place of the format's ``{prompt}``, if not its own: BGE's question after every pair, Qwen3's
            instruction.
        max_length: largest number of tokens, if not the format's; in the format ``bge``, before the last newline and
            the prompt.
        batch_size: pairs per forward pass.
        commit: commit of the hub repository that the reranker was loaded from.

    Raises:
        InputError: both tokens of the score are the same, the fixed pieces are longer than ``max_length``, or the
            classification head has several labels or cannot have the format's score.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        format: RerankerFormat = BGE,
        prompt: str | None = None,
        max_length: int | None = None,
        batch_size: int = 32,
        commit: str | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.format = format
        self.prompt = format.prompt if prompt is None else prompt
        self.max_length = format.max_length if max_length is None else max_length
        self.batch_size = batch_size
        self.commit = commit
        self.device = model.device
        bos = tokenizer.bos_token_id
        self._bos = [] if bos is None or bos == tokenizer.pad_token_id or not format.bos else [bos]
        self._classifies = type(model).__name__.endswith("ForSequenceClassification")
        if self._classifies:
            if model.config.num_labels != 1:
                raise InputError(f"{model.name_or_path}: {model.config.num_labels} scores of each pair instead of one")
            if format.yes is None:
                raise InputError(
                    f"{model.name_or_path}: a classification head; a query's likelihood needs a language model"
                )
            if model.config.pad_token_id is None:
                model.config.pad_token_id = 0  # such models read the last token that is not padding
        elif format.yes is not None:
            texts = [format.yes] if format.no is None else [format.yes, format.no]
            self._score_tokens = [ids[0] for ids in self._tokenise(texts)]
            if len(texts) != len(set(self._score_tokens)):
                raise InputError(f"reranker format: yes and no ({', '.join(texts)}) begin with the same token")
        fixed = [self._bos, *self._tokenise([format.fill(piece, "", "", self.prompt) for piece in format.pieces])]
        room = self.max_length - (sum(map(len, fixed)) if format.counts_suffix else 0)
        if room < 1:
            raise InputError(f"reranker format: max_length {self.max_length} leaves no room for a passage")
        self._query_limit = room * 3 // 4
        # Models without position embeddings (ALiBi, state space) have no such argument.
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    @classmethod
    def load(
        cls,
        name_or_path: str | Path,
        *,
        device: str = "cpu",
        dtype: str = "auto",
        batch_size: int = 32,
        format: str | None = None,
        prompt: str | None = None,
        max_length: int | None = None,
        trust_remote_code: bool = False,
    ) -> Reranker:
        """Load a decoder LLM, a trained reranker or a LoRA adapter from a directory or the hub.

        Cross-encoders are loaded by `genpoe_plugin.selection.rerankers.load_reranker`.

        Args:
            name_or_path: a directory, or a hub repository as ``user/name`` or ``user/name@revision``.
            device: device of the model.
            dtype: dtype of the weights; ``auto`` keeps that of the checkpoint.
            batch_size: pairs per forward pass.
            format: a built-in format or a template file; without one, it is recognised by the checkpoint
                (`genpoe_plugin.selection.recognition.recognise`).
            prompt, max_length: replace the values of the format, or those saved with a trained reranker.
            trust_remote_code: whether to run code from the repository.

        Raises:
            InputError: there is no such model or device, the checkpoint is incomplete or not a causal language model,
                or its format is not known.
        """
        name = str(name_or_path)
        recognised = recognise(name, format)
        if recognised.format is None:
            raise InputError(f"{name}: not a decoder LLM; load it with genpoe_plugin.selection.rerankers.load_reranker")
        model_class = AutoModelForSequenceClassification if recognised.classifies else AutoModelForCausalLM
        repository, of_hub = loaded_from(name)
        try:
            tokenizer = AutoTokenizer.from_pretrained(repository, trust_remote_code=trust_remote_code, **of_hub)
            loaded: Any = model_class.from_pretrained(
                repository, dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True, **of_hub
            )
        except Exception as error:  # each kind of damage to a checkpoint raises another type of error
            if Path(name).is_dir():
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise InputError(f"{name}: cannot be loaded as a causal language model: {reason}") from error
            raise InputError(
                f"{name}: no such directory, and no such model on the hub (or the hub is unreachable)"
            ) from error
        model, info = loaded
        if info["missing_keys"]:
            raise InputError(
                f"{name}: not a causal language model, its checkpoint lacks {len(info['missing_keys'])} tensors "
                f"such as {min(info['missing_keys'])}; give a decoder LLM or a reranker trained from one"
            )
        settings = recognised.settings
        if prompt is not None:
            settings["prompt"] = prompt
        if max_length is not None:
            settings["max_length"] = max_length
        commit = commit_of(*split_revision(name))
        return cls(
            to_device(model, device).eval(),
            tokenizer,
            format=recognised.format,
            batch_size=batch_size,
            commit=commit,
            **settings,
        )

    def save(self, directory: str | Path) -> None:
        """Write weights (safetensors), tokenizer and format, for :meth:`load`; FlagEmbedding reads ``bge`` as well."""
        self.model.save_pretrained(directory)
        self.save_text_side(directory)

    def save_text_side(self, directory: str | Path) -> None:
        """Write only tokenizer, format, prompt and maximum length, for a directory that holds an adapter."""
        self.tokenizer.save_pretrained(directory)
        settings = {"format": self.format.saved, "prompt": self.prompt, "max_length": self.max_length}
        (Path(directory) / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    def encode(self, pairs: Sequence[tuple[str, str]]) -> list[EncodedPair]:
        """The input of every (query, passage) pair; each distinct text is tokenised once."""
        pieces = [
            self._tokenise_each([self.format.fill(piece, query, passage, self.prompt) for query, passage in pairs])
            for piece in self.format.pieces
        ]
        at = self.format.passage_piece
        for number, piece in enumerate(self.format.pieces):
            if QUERY in piece and number != at:
                pieces[number] = [ids[: self._query_limit] for ids in pieces[number]]
        rows = []
        for parts in zip(*pieces, strict=True):
            head = self._bos + [token for part in parts[:at] for token in part]
            tail = [token for part in parts[at + 1 :] for token in part]
            room = self.max_length - len(head) - (len(tail) if self.format.counts_suffix else 0)
            ids = head + parts[at][: max(room, 0)] + tail
            # Nothing predicts the first token.
            rows.append(EncodedPair(ids, min(len(parts[-1]), len(ids) - 1) if self.format.yes is None else 0))
        return rows

    def score_rows(self, rows: Sequence[EncodedPair]) -> Tensor:
        """The scores, float32 ``[n]`` on the model's device, of rows from :meth:`encode`; differentiable."""
        batches = list(self._batches(rows))
        order = torch.tensor([index for batch in batches for index in batch])
        scores = torch.cat([self._forward([rows[index] for index in batch]) for batch in batches])
        return scores[order.argsort().to(scores.device)]

    @torch.inference_mode()
    def score(self, pairs: Sequence[tuple[str, str]], *, progress: bool = False) -> np.ndarray:
        """The score of every (query, passage string) pair, float32 ``[n]``; higher is more relevant."""
        self.model.eval()
        scores = np.empty(len(pairs), dtype=np.float32)
        with tqdm(total=len(pairs), desc="reranking", unit="pair", disable=not progress) as bar:
            for start in range(0, len(pairs), WINDOW):
                rows = self.encode(pairs[start : start + WINDOW])
                for batch in self._batches(rows):
                    scores[start + np.array(batch)] = self._forward([rows[index] for index in batch]).cpu().numpy()
                    bar.update(len(batch))
        return scores

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything that decides a score: configuration, vocabulary, format, maximum length and weights."""
        settings = [self.prompt, self.max_length]
        if self.format != BGE:  # so that fingerprints from before there were formats keep their value
            settings.append(self.format.saved)
        return fingerprint_of(self.model, self.model.config, self.tokenizer, settings)

    def _tokenise(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []

    def _tokenise_each(self, texts: list[str]) -> list[list[int]]:
        """The tokens of each text; each distinct text is tokenised once."""
        distinct = list(dict.fromkeys(texts))
        ids = dict(zip(distinct, self._tokenise(distinct), strict=True))
        return [ids[text] for text in texts]

    def _batches(self, rows: Sequence[EncodedPair]) -> Iterator[list[int]]:
        """Indices of ``rows`` in batches of similar length, the longest first, so that memory errors occur at once."""
        order = sorted(range(len(rows)), key=lambda index: -len(rows[index].ids))
        for start in range(0, len(order), self.batch_size):
            yield order[start : start + self.batch_size]

    def _forward(self, rows: Sequence[EncodedPair]) -> Tensor:
        width = max(len(row.ids) for row in rows)
        ids = torch.tensor([[0] * (width - len(row.ids)) + row.ids for row in rows])
        mask = torch.tensor([[0] * (width - len(row.ids)) + [1] * len(row.ids) for row in rows])
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self._takes_positions:
            inputs["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
        inputs = {key: value.to(self.device) for key, value in inputs.items()}
        if self._classifies:
            return self.model(**inputs, use_cache=False).logits[:, 0].float()
        # Logits of the last positions only: with Gemma's vocabulary, those of all positions would exceed the model.
        scored = max(row.scored for row in rows)
        logits = self.model(**inputs, use_cache=False, logits_to_keep=scored + 1).logits.float()
        if self.format.yes is None:
            targets = inputs["input_ids"][:, width - scored :]
            counts = torch.tensor([row.scored for row in rows], device=self.device)
            belongs = torch.arange(scored, 0, -1, device=self.device) <= counts[:, None]
            losses = functional.cross_entropy(logits[:, :-1].transpose(1, 2), targets, reduction="none")
            return -(losses * belongs).sum(dim=1)
        values = logits[:, -1, self._score_tokens]
        return values[:, 0] if self.format.no is None else values[:, 0] - values[:, 1]


def fingerprint_of(
    model: nn.Module, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, settings: Sequence[Any]
) -> str:
    """SHA-256 of a model's weights and configuration, its vocabulary, and settings."""
    known = config.to_dict()
    for volatile in ("_name_or_path", "transformers_version"):
        known.pop(volatile, None)
    facts = [known, sorted(tokenizer.get_vocab().items()), *settings]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def rerank(
    questions: Sequence[Question],
    reranker: Scorer,
    *,
    strings: Mapping[str, str] | None = None,
    progress: bool = False,
) -> list[Question]:
    """The questions, with their passages scored and sorted by the reranker; each distinct pair is scored once.

    Args:
        questions: questions with passages.
        reranker: scores the pairs.
        strings: cut strings by passage string; a passage that is not in it is read whole.
        progress: whether to show a progress bar.
    """
    read = strings or {}
    rows = [
        [(question.question, read.get(item.passage.string, item.passage.string)) for item in question.passages]
        for question in questions
    ]
    unique = list(dict.fromkeys(pair for row in rows for pair in row))
    scores = dict(zip(unique, reranker.score(unique, progress=progress).tolist(), strict=True))
    return [
        replace(
            question,
            passages=by_rerank_score(
                tuple(
                    replace(item, rerank_score=scores[pair]) for item, pair in zip(question.passages, row, strict=True)
                )
            ),
        )
        for question, row in zip(questions, rows, strict=True)
    ]
