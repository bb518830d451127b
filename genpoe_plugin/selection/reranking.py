"""The reranker: a decoder LLM that scores whether a passage answers a question."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from genpoe_plugin.data.questions import Question, by_rerank_score
from genpoe_plugin.errors import InputError
from genpoe_plugin.hub import commit_of, loaded_from, split_revision
from genpoe_plugin.llm.language_model import to_device

DEFAULT_PROMPT = (
    "Given a query A and a passage B, determine whether the passage contains an answer to the query "
    "by providing a prediction of either 'Yes' or 'No'."
)
DEFAULT_MAX_LENGTH = 512
SETTINGS_FILE = "reranker.json"
# Number of pairs that are tokenised and sorted by length together: enough for batches with little padding, in bounded
# memory.
WINDOW = 4096


class Reranker:
    """Scores (query, passage) pairs by the logit of "Yes" at the last position, as bge-reranker-v2-gemma does.

    The input of a pair is ``[bos] + "A: {query}" + "\\n" + "B: {passage}" + "\\n" + prompt``. Each piece is tokenised
    separately, so no token spans two pieces. Everything before the last newline has at most ``max_length`` tokens: the
    passage is cut to fit, and the query is cut at 3/4 of that length, so that some of the passage is always read. "Yes"
    is the first token of that word alone. There is no bos if the tokenizer has none or uses it for padding. These are
    FlagEmbedding's rules, so its rerankers keep their scores.

    Args:
        model: the decoder LLM.
        tokenizer: the LLM's tokenizer.
        prompt: the question to the LLM after every pair.
        max_length: largest number of tokens before the last newline and the prompt.
        batch_size: pairs per forward pass.
        commit: commit of the hub repository that the reranker was loaded from.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        prompt: str = DEFAULT_PROMPT,
        max_length: int = DEFAULT_MAX_LENGTH,
        batch_size: int = 32,
        commit: str | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.prompt = prompt
        self.max_length = max_length
        self.batch_size = batch_size
        self.commit = commit
        bos = tokenizer.bos_token_id
        self._bos = [] if bos is None or bos == tokenizer.pad_token_id else [bos]
        yes, self._newline, self._prompt = self._tokenise(["Yes", "\n", prompt])
        self._yes = yes[0]
        # Models without position embeddings (ALiBi, state space) have no such argument.
        self.device = model.device
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    @classmethod
    def load(
        cls,
        name_or_path: str | Path,
        *,
        device: str = "cpu",
        dtype: str = "auto",
        batch_size: int = 32,
        prompt: str | None = None,
        max_length: int | None = None,
        trust_remote_code: bool = False,
    ) -> Reranker:
        """Load a decoder LLM, a trained reranker or a LoRA adapter from a directory or the hub.

        Args:
            name_or_path: a directory, or a hub repository as ``user/name`` or ``user/name@revision``.
            device: device of the model.
            dtype: dtype of the weights; ``auto`` keeps that of the checkpoint.
            batch_size: pairs per forward pass.
            prompt, max_length: replace the values saved with a trained reranker.
            trust_remote_code: whether to run code from the repository.

        Raises:
            InputError: there is no such model or device, or the checkpoint is incomplete or not a causal language
                model.
        """
        name = str(name_or_path)
        repository, of_hub = loaded_from(name)
        try:
            tokenizer = AutoTokenizer.from_pretrained(repository, trust_remote_code=trust_remote_code, **of_hub)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
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
        settings: dict[str, Any] = _read_settings(repository, of_hub.get("revision"))
        if prompt is not None:
            settings["prompt"] = prompt
        if max_length is not None:
            settings["max_length"] = max_length
        commit = commit_of(*split_revision(name))
        return cls(to_device(model, device).eval(), tokenizer, batch_size=batch_size, commit=commit, **settings)

    def save(self, directory: str | Path) -> None:
        """Write weights (safetensors), tokenizer and prompt, in the format that :meth:`load` and FlagEmbedding read."""
        self.model.save_pretrained(directory)
        self.save_text_side(directory)

    def save_text_side(self, directory: str | Path) -> None:
        """Write only tokenizer, prompt and maximum length, for a directory that holds an adapter."""
        self.tokenizer.save_pretrained(directory)
        settings = {"prompt": self.prompt, "max_length": self.max_length}
        (Path(directory) / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    def encode(self, pairs: Sequence[tuple[str, str]]) -> list[list[int]]:
        """The input ids of every (query, passage) pair, unpadded; each distinct text is tokenised once."""
        queries = list(dict.fromkeys(query for query, _ in pairs))
        passages = list(dict.fromkeys(passage for _, passage in pairs))
        query_ids = dict(zip(queries, self._tokenise([f"A: {query}" for query in queries]), strict=True))
        passage_ids = dict(zip(passages, self._tokenise([f"B: {passage}" for passage in passages]), strict=True))
        rows = []
        for query, passage in pairs:
            head = self._bos + query_ids[query][: self.max_length * 3 // 4] + self._newline
            room = max(self.max_length - len(head), 0)
            rows.append(head + passage_ids[passage][:room] + self._newline + self._prompt)
        return rows

    def yes_logits(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """The "Yes" logits, float32 ``[n]`` on the model's device, of rows from :meth:`encode`; differentiable."""
        batches = list(self._batches(rows))
        order = torch.tensor([index for batch in batches for index in batch])
        logits = torch.cat([self._forward([rows[index] for index in batch]) for batch in batches])
        return logits[order.argsort().to(logits.device)]

    @torch.inference_mode()
    def score(self, pairs: Sequence[tuple[str, str]], *, progress: bool = False) -> np.ndarray:
        """The "Yes" logit of every (query, passage string) pair, float32 ``[n]``; higher is more relevant."""
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
        """SHA-256 of everything that decides a score: configuration, vocabulary, prompt, maximum length and weights."""
        config = self.model.config.to_dict()
        for volatile in ("_name_or_path", "transformers_version"):
            config.pop(volatile, None)
        settings = [config, sorted(self.tokenizer.get_vocab().items()), self.prompt, self.max_length]
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
        for name, weight in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    def _tokenise(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []

    def _batches(self, rows: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Indices of ``rows`` in batches of similar length, the longest first, so that memory errors occur at once."""
        order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
        for start in range(0, len(order), self.batch_size):
            yield order[start : start + self.batch_size]

    def _forward(self, rows: Sequence[Sequence[int]]) -> Tensor:
        width = max(len(row) for row in rows)
        ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self._takes_positions:
            inputs["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
        inputs = {key: value.to(self.device) for key, value in inputs.items()}
        # Logits of the last position only: with Gemma's vocabulary, those of all positions would exceed the model.
        return self.model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1, self._yes].float()


def rerank(
    questions: Sequence[Question],
    reranker: Reranker,
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


def _read_settings(name: str, revision: str | None) -> dict[str, Any]:
    """Prompt and maximum length saved with a trained reranker; empty for an LLM without them."""
    try:
        path = Path(str(cached_file(name, SETTINGS_FILE, revision=revision)))
    except OSError:
        return {}
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        return {"prompt": str(saved["prompt"]), "max_length": int(saved["max_length"])}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f'{path}: invalid reranker settings; they must be {{"prompt": text, "max_length": number}}'
        ) from error
