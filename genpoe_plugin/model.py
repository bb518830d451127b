"""A frozen LLM and its experts in Python: answers, likelihoods, and experts in a decode loop of one's own."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import HfApi
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from genpoe_plugin.checkpoint import CONFIG, WEIGHTS, load_hypernetwork, resolve_checkpoint
from genpoe_plugin.errors import InputError
from genpoe_plugin.experts.injection import inject, observe_router
from genpoe_plugin.experts.store import DTYPES, ExpertStore
from genpoe_plugin.files import atomic_directory
from genpoe_plugin.language_model import load_language_model
from genpoe_plugin.prompts import (
    EXPERT_MODES,
    MODES,
    PROMPT_MODES,
    closed_book_prompt,
    cut_passages,
    knowledge_block,
    tokens_from,
)

Passages = Sequence[Sequence[str]]
"""For each question its passages, best first, each as ``title: text`` or as text alone."""
Gates = Sequence[Sequence[float]] | None
"""For each question a gate for each of its passages; None for equal ones."""


class GenPoEModel:
    """A frozen decoder LLM, and the hypernetwork that makes its experts.

    The LLM is never changed: experts are there during a call, or inside the block of `experts`.

    Args:
        llm, tokenizer: as `transformers` loads them; the tokenizer has to be of the fast kind.
        hypernetwork: a checkpoint for this LLM: a directory, or a repository of the hub as ``user/name`` or
            ``user/name@revision``.
        expert_dtype: of the experts that are kept (``float32``, ``bfloat16``, ``float16``, and ``int8`` where they are
            in the attention); the LLM's without it.

    Raises:
        InputError: the checkpoint is missing, damaged, or belongs to another LLM.
    """

    def __init__(
        self,
        llm: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        hypernetwork: str | Path,
        *,
        expert_dtype: str | None = None,
    ) -> None:
        if expert_dtype is not None and expert_dtype not in DTYPES:
            raise InputError(f"expert_dtype={expert_dtype}: not one of {', '.join(DTYPES)}")
        self.llm, self.tokenizer = llm, tokenizer
        self.hypernetwork = load_hypernetwork(hypernetwork, llm, tokenizer)
        self._checkpoint = resolve_checkpoint(hypernetwork)
        self._store = ExpertStore(
            self.hypernetwork, llm, tokenizer, dtype=None if expert_dtype is None else DTYPES[expert_dtype]
        )

    @classmethod
    def from_pretrained(
        cls,
        llm: str,
        hypernetwork: str | Path,
        *,
        device: str = "cpu",
        dtype: str = "auto",
        expert_dtype: str | None = None,
        trust_remote_code: bool = False,
    ) -> GenPoEModel:
        """Load an LLM by its directory or hub name, and a checkpoint for it.

        Raises:
            InputError: either cannot be loaded, or they do not belong together.
        """
        model, tokenizer = load_language_model(llm, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
        return cls(model, tokenizer, hypernetwork, expert_dtype=expert_dtype)

    @torch.no_grad()
    def generate(
        self,
        questions: Sequence[str],
        passages: Passages | None = None,
        gates: Gates = None,
        *,
        mode: str = "genpoe",
        batch_size: int = 16,
        **generation: Any,
    ) -> list[str]:
        """The LLM's answers.

        Args:
            questions: any number.
            passages: any number for each question; a question without any is answered by the LLM alone.
            mode: ``closed_book``, ``rag`` (passages in the prompt), ``genpoe`` (as experts) or ``genpoe_rag`` (both).
            batch_size: questions at a time.
            generation: arguments of the LLM's ``generate``; 32 new tokens, greedily, where nothing else is said.

        Raises:
            InputError: no such mode, or lists of different lengths.
        """
        options = {"max_new_tokens": 32, "do_sample": False, "pad_token_id": self._padding} | generation
        prompts, passages, gates, starts = self._laid_out(questions, passages, gates, mode)
        answers: list[str] = []
        for begin in range(0, len(prompts), batch_size):
            part = slice(begin, begin + batch_size)
            batch = self._encoded(prompts[part])
            with self._with_experts(passages[part], gates[part], starts[part], mode):
                found = self.llm.generate(**batch, **options)  # type: ignore[operator]
            new = found[:, batch["input_ids"].shape[1] :]
            answers += self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return answers

    @torch.no_grad()
    def score(
        self,
        questions: Sequence[str],
        answers: Sequence[str],
        passages: Passages | None = None,
        gates: Gates = None,
        *,
        mode: str = "genpoe",
    ) -> list[float]:
        """The log-likelihood of an answer to each question, in nats, summed over its tokens.

        Args:
            answers: one for each question; a space is put before it.
            passages, gates, mode: as of `generate`.

        Raises:
            InputError: no such mode, or lists of different lengths.
        """
        if len(answers) != len(questions):
            raise InputError(f"{len(questions)} questions, but {len(answers)} answers")
        prompts, passages, gates, starts = self._laid_out(questions, passages, gates, mode)
        scores = []
        for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            ids = self._encoded([f"{prompt} {answer}"])["input_ids"]
            known = len(self.tokenizer(prompt)["input_ids"])
            row = slice(number, number + 1)
            with self._with_experts(passages[row], gates[row], starts[row], mode):
                logits = self.llm(ids).logits[0, known - 1 : -1].float()
            scores.append(-functional.cross_entropy(logits, ids[0, known:].to(logits.device), reduction="sum").item())
        return scores

    @property
    def has_router(self) -> bool:
        """Whether the LLM's attention weighs the experts."""
        return (self.hypernetwork.config.head, self.hypernetwork.config.place) == ("attention", "attention")

    @torch.no_grad()
    def router_mass(self, questions: Sequence[str], passages: Passages, gates: Gates = None) -> list[list[float]]:
        """How much of the attention each passage has when the LLM is about to answer.

        Args:
            passages: at least one for each question.

        Returns:
            For each question and passage its share of the softmax at the prompt's last token, a mean over heads and
            layers with experts. What is missing to 1 is the share of the prompt itself.

        Raises:
            InputError: the experts are not in the attention, a question has no passage, or lists of different lengths.
        """
        if not self.has_router:
            raise InputError("there is a router for experts in the attention alone; gates weigh those beside an MLP")
        prompts, passages, gates, starts = self._laid_out(questions, passages, gates, "genpoe")
        if empty := [number for number, own in enumerate(passages) if not own]:
            raise InputError(f"question {empty[0]} has no passage")
        found = []
        for number, prompt in enumerate(prompts):
            row = slice(number, number + 1)
            with self.experts(passages[row], gates[row], starts[row]), observe_router() as masses:
                self.llm(**self._encoded([prompt]))
            units = torch.stack([mass.cpu() for mass in masses.values()]).mean(0)[0]
            found.append([float(part.sum()) for part in units.split(self._store.units(passages[number]))])
        return found

    @contextmanager
    def experts(self, passages: Passages, gates: Gates = None, start: Sequence[int] | None = None) -> Iterator[None]:
        """Experts in every forward pass of the LLM inside the block, for a decode loop of one's own.

        Args:
            passages: for each row of the batch.
            start: for each row the first position that its experts act on, padding not counted; 0 without it.

        Raises:
            InputError: lists of different lengths.
        """
        rows = self._store.rows(
            passages, _checked_gates(passages, gates), [0] * len(passages) if start is None else start
        )
        with inject(self.llm, self._store.layers, rows):
            yield

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the hypernetwork, and what LLM it belongs to, as a checkpoint; the LLM itself is not written."""
        with atomic_directory(directory) as temporary:
            for name in (WEIGHTS, CONFIG):  # as they were read: in memory, weights may have the LLM's precision
                shutil.copyfile(self._checkpoint / name, temporary / name)

    def push_to_hub(self, repository: str, *, revision: str | None = None, private: bool = False) -> str:
        """Upload the hypernetwork's checkpoint, with the token that ``hf auth login`` keeps.

        Returns:
            The address of the commit.
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(Path(folder) / "checkpoint")
            api = HfApi()
            api.create_repo(repository, private=private, exist_ok=True)
            if revision is not None:
                api.create_branch(repository, branch=revision, exist_ok=True)
            commit = api.upload_folder(repo_id=repository, folder_path=Path(folder) / "checkpoint", revision=revision)
        return str(commit.commit_url)

    def _laid_out(
        self, questions: Sequence[str], passages: Passages | None, gates: Gates, mode: str
    ) -> tuple[list[str], Passages, Sequence[Sequence[float]], list[int]]:
        """Prompts, what is put into the LLM beside them, and from which token on."""
        if mode not in MODES:
            raise InputError(f"mode={mode}: not one of {', '.join(MODES)}")
        none: list[Sequence[str]] = [()] * len(questions)
        given = none if passages is None or mode == "closed_book" else list(passages)
        if isinstance(questions, str) or any(isinstance(own, str) for own in given):
            raise InputError("questions are a list, and passages a list for each question")
        if len(given) != len(questions):
            raise InputError(f"{len(questions)} questions, but passages for {len(given)}")
        checked = _checked_gates(given, None if mode == "closed_book" else gates)
        prompts, starts = [], []
        for question, own in zip(questions, given, strict=True):
            shown = knowledge_block(cut_passages(own, self.tokenizer)) if mode in PROMPT_MODES else ""
            text = shown + closed_book_prompt(question)
            count = len(self.tokenizer(text)["input_ids"])
            prompts.append(text)
            starts.append(count - tokens_from(text, len(shown), self.tokenizer) if shown else 0)
        return prompts, given, checked, starts

    @contextmanager
    def _with_experts(
        self, passages: Passages, gates: Sequence[Sequence[float]], starts: Sequence[int], mode: str
    ) -> Iterator[None]:
        if mode not in EXPERT_MODES:
            yield
            return
        with self.experts(passages, gates, starts):
            yield

    @property
    def _padding(self) -> int:
        tokenizer = self.tokenizer
        found = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        return 0 if found is None else int(found)

    def _encoded(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Token ids and mask, padded on the left, on the LLM's device."""
        rows = [self.tokenizer(text)["input_ids"] for text in texts]
        most = max(map(len, rows))
        ids = torch.tensor([[self._padding] * (most - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (most - len(row)) + [1] * len(row) for row in rows])
        return {"input_ids": ids.to(self.llm.device), "attention_mask": mask.to(self.llm.device)}


def _checked_gates(passages: Passages, gates: Gates) -> Sequence[Sequence[float]]:
    """Gates as they were given, or equal ones that add up to 1.

    Raises:
        InputError: they are not as many as the passages, or one is negative.
    """
    if gates is None:
        return [[1 / len(own) for _ in own] for own in passages]
    if [len(own) for own in gates] != [len(own) for own in passages]:
        raise InputError("gates have to be as many as the passages, for every question")
    if any(gate < 0 for own in gates for gate in own):
        raise InputError("a gate is negative; give numbers from 0 on")
    return gates
