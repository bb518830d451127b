"""A frozen LLM and its experts in Python: answers, likelihoods, and experts in a decode loop of one's own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from genpoe_plugin.arguments import check_value
from genpoe_plugin.checkpoints.checkpoint import HypernetworkCheckpoint
from genpoe_plugin.errors import InputError
from genpoe_plugin.experts.injection import inject, observe_router
from genpoe_plugin.experts.store import ExpertStore
from genpoe_plugin.llm.language_model import check_tokenizer, context_length, load_language_model
from genpoe_plugin.prompts import (
    EXPERT_MODES,
    MAX_NEW_TOKENS,
    PROMPT_MODES,
    STOP,
    closed_book_prompt,
    cut_passages,
    expert_start,
    in_mode,
)
from genpoe_plugin.selection.gates import softmax, uniform
from genpoe_plugin.training.batches import answer_logits, make_batch, token_losses
from genpoe_plugin.training.examples import DrawnExample

Passages = Sequence[Sequence[str]]
"""For each question its passages, best first, each as ``title: text`` or as text alone; at most 256 tokens are read."""
Gates = Sequence[Sequence[float]] | None
"""For each question a gate for each of its passages; None for equal ones."""
_ONE_ANSWER = ("num_return_sequences", "return_dict_in_generate")


@dataclass(frozen=True, slots=True)
class _Row:
    """A question as the LLM reads it: its prompt, with so many passages in it, and the experts beside it."""

    question: str
    prompt: str
    ids: list[int]
    shown: int
    passages: tuple[str, ...]
    gates: tuple[float, ...]
    start: int


class GenPoEModel:
    """A frozen decoder LLM, and the hypernetwork that makes its experts.

    The LLM's weights are never changed: experts are there during a call, or inside the block of `experts`. Its parts
    are those of ``lm_eval --model genpoe``, so the same passages and gates give the same answers there.

    Args:
        llm, tokenizer: as `transformers` loads them; the tokenizer has to be of the fast kind. The LLM is put into
            evaluation mode.
        hypernetwork: a checkpoint for this LLM: a directory, a repository of the hub as ``user/name`` or
            ``user/name@revision``, or a `HypernetworkCheckpoint`.
        revision: of the hypernetwork's repository, where it is not in its name.
        expert_dtype: of the experts that are kept (``float32``, ``bfloat16``, ``float16``, and ``int8`` where they are
            in the attention); the LLM's without it.

    Attributes:
        checkpoint: where the hypernetwork is from, and its commit.

    Raises:
        InputError: the checkpoint is missing, damaged, or belongs to another LLM.
    """

    def __init__(
        self,
        llm: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        hypernetwork: str | Path | HypernetworkCheckpoint,
        *,
        revision: str | None = None,
        expert_dtype: str | None = None,
    ) -> None:
        check_value("expert_dtype", expert_dtype)
        check_tokenizer(tokenizer, str(llm.config.name_or_path))
        self.llm, self.tokenizer = llm.eval(), tokenizer
        self.checkpoint = HypernetworkCheckpoint.from_pretrained(hypernetwork, revision=revision)
        self.hypernetwork = self.checkpoint.load(llm, tokenizer)
        self._store = ExpertStore(
            self.hypernetwork, llm, tokenizer, dtype=None if expert_dtype is None else getattr(torch, expert_dtype)
        )

    @classmethod
    def from_pretrained(
        cls,
        llm: str | Path | PreTrainedModel,
        hypernetwork: str | Path | HypernetworkCheckpoint,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        revision: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        expert_dtype: str | None = None,
        gguf_file: str | None = None,
        trust_remote_code: bool = False,
    ) -> GenPoEModel:
        """Load an LLM, or take one that is loaded, and a checkpoint for it.

        Args:
            llm: a directory, a repository of the hub as ``user/name`` or ``user/name@revision``, or a loaded LLM.
            hypernetwork, revision, expert_dtype: as of the class.
            tokenizer: of a loaded LLM, which needs one; for an LLM by name it is loaded beside it.
            device: ``cpu``, which it is by default, or such as ``cuda:1``.
            dtype: ``float32``, ``bfloat16``, ``float16`` or ``auto``, which it is by default: as the LLM is stored.
            gguf_file: in the LLM's directory or repository, to read it from.
            trust_remote_code: run code that comes with the LLM.

        Raises:
            InputError: either cannot be loaded, or they do not belong together; a loaded LLM comes without tokenizer,
                or with what is for loading.
        """
        if isinstance(llm, str | Path):
            if tokenizer is not None:
                raise InputError("tokenizer: it is loaded beside an LLM that is given by name; leave it out")
            model, tokenizer = load_language_model(
                str(llm),
                device=device or "cpu",
                dtype=dtype or "auto",
                gguf_file=gguf_file,
                trust_remote_code=trust_remote_code,
            )
        else:
            model = llm
            told = {"device": device, "dtype": dtype, "gguf_file": gguf_file}
            if loading := [name for name, value in told.items() if value is not None]:
                raise InputError(f"{loading[0]}={told[loading[0]]}: the LLM is loaded already; leave it out")
            if tokenizer is None:
                raise InputError("a loaded LLM needs its tokenizer; give tokenizer=")
        return cls(model, tokenizer, hypernetwork, revision=revision, expert_dtype=expert_dtype)

    @staticmethod
    def gates(scores: Sequence[Sequence[float]], gate_temperature: float = 1.0) -> list[tuple[float, ...]]:
        """Gates of scores, a reranker's or a retriever's, as an evaluation makes them.

        Args:
            scores: for each question one for each of its passages; the higher, the better.
            gate_temperature: above 0. Gates are the softmax of the scores divided by it: with a large one they are
                equal, with a small one the best passage counts alone.

        Returns:
            For each question as many gates as it has scores; they add up to 1.

        Raises:
            InputError: a score is not a finite number, or the temperature is not one above 0.
        """
        check_value("gate_temperature", gate_temperature)
        for number, own in enumerate(scores):
            if not all(math.isfinite(score) for score in own):
                raise InputError(f"question {number}: a score is not a finite number; give one for every passage")
        return [softmax(own, gate_temperature) for own in scores]

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
        """The LLM's answers, in the order of the questions.

        Args:
            questions: any number; a first letter in lower case and a missing question mark are mended.
            passages: any number for each question; a question without any is answered by the LLM alone.
            gates: as many; they say how much each passage counts. `gates` makes them of scores.
            mode: ``closed_book``, ``rag`` (passages in the prompt), ``genpoe`` (as experts) or ``genpoe_rag`` (both).
                Where the prompt gets too long for the LLM, passages are left out of it, the last ones first.
            batch_size: questions at a time.
            generation: arguments of the LLM's ``generate``. As in the tasks of ``lm_eval``, where nothing else is
                said: greedy, at most 32 new tokens, and up to a new line with ``Question:`` (``stop_strings``).

        Returns:
            For each question what the LLM wrote, without the stop string; its first line is the answer.

        Raises:
            InputError: no such mode, lists of different lengths, a gate that cannot be, or arguments of ``generate``
                that return more than one text a question.
        """
        if wrong := [name for name in _ONE_ANSWER if generation.get(name) not in (None, False, 1)]:
            raise InputError(f"{wrong[0]}={generation[wrong[0]]}: there is one answer a question; leave it out")
        options: dict[str, Any] = {"do_sample": False, "pad_token_id": self._padding, "stop_strings": [STOP]}
        if "max_length" not in generation:
            options["max_new_tokens"] = MAX_NEW_TOKENS
        options |= generation
        stops = options.get("stop_strings") or []
        stops = [stops] if isinstance(stops, str) else list(stops)
        options["stop_strings"] = stops or None
        rows = self._laid_out(questions, passages, gates, mode, options.get("max_new_tokens") or 0)
        answers = [""] * len(rows)
        for numbers in self._batches(rows, mode, batch_size):
            part = [rows[number] for number in numbers]
            batch = self._encoded(part)
            with self._with_experts(part, mode):
                found = self.llm.generate(**batch, **options, tokenizer=self.tokenizer)
            new = found[:, batch["input_ids"].shape[1] :]
            for number, text in zip(numbers, self.tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
                for stop in stops:
                    text = text.partition(stop)[0]
                answers[number] = text
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
        batch_size: int = 16,
    ) -> list[float]:
        """The log-likelihood of an answer to each question, in nats, summed over its tokens.

        Args:
            answers: one for each question; a space is put before it.
            passages, gates, mode, batch_size: as of `generate`.

        Raises:
            InputError: no such mode, lists of different lengths, an empty answer, or a gate that cannot be.
        """
        if isinstance(answers, str) or len(answers) != len(questions):
            raise InputError(f"{len(questions)} questions, but {len(answers)} answers; give a list with one for each")
        if empty := [number for number, answer in enumerate(answers) if not answer.strip()]:
            raise InputError(f"answer {empty[0]} is empty")
        longest = max((len(self._ids(answer)) for answer in answers), default=0)
        rows = self._laid_out(questions, passages, gates, mode, longest)
        scores = [0.0] * len(rows)
        for numbers in self._batches(rows, mode, batch_size):
            part = [rows[number] for number in numbers]
            examples = [
                DrawnExample(row.question, answers[number], row.passages[: row.shown], row.gates[: row.shown])
                for number, row in zip(numbers, part, strict=True)
            ]
            batch = make_batch(examples, mode in PROMPT_MODES, self.tokenizer, end="")
            with self._with_experts(part, mode):
                logits = answer_logits(self.llm, batch, self.llm.device)
            losses = token_losses(logits, batch.labels.to(logits.device)).sum(1)
            for number, loss in zip(numbers, losses.tolist(), strict=True):
                scores[number] = -loss
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
        rows = self._laid_out(questions, passages, gates, "genpoe")
        if empty := [number for number, row in enumerate(rows) if not row.passages]:
            raise InputError(f"question {empty[0]} has no passage")
        found = []
        for row in rows:
            with self._with_experts([row], "genpoe"), observe_router() as masses:
                self.llm(**self._encoded([row]))
            units = torch.stack([mass.cpu() for mass in masses.values()]).mean(0)[0]
            found.append([float(part.sum()) for part in units.split(self._store.units(row.passages))])
        return found

    @contextmanager
    def experts(self, passages: Passages, gates: Gates = None, start: Sequence[int] | None = None) -> Iterator[None]:
        """Experts in every forward pass of the LLM inside the block, for a decode loop of one's own.

        Args:
            passages: for each row of the batch; a batch may also be a multiple of the rows, as beams are.
            gates: for each row as many as passages; equal ones, which add up to 1, without them.
            start: for each row the first position (padding not counted) that its experts act on; 0 without it. Where
                passages stand in the prompt as well, it is that of the question.

        Raises:
            InputError: lists of different lengths, or a gate that cannot be.
        """
        given = _checked_passages(passages, len(passages))
        cut = [tuple(cut_passages(own, self.tokenizer)) for own in given]
        if start is not None and len(start) != len(cut):
            raise InputError(f"passages for {len(cut)} rows, but starts for {len(start)}")
        rows = self._store.rows(cut, _checked_gates(cut, gates), [0] * len(cut) if start is None else start)
        with inject(self.llm, self._store.layers, rows):
            yield

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the hypernetwork's checkpoint, and its card; the LLM itself is not written.

        Raises:
            InputError: the directory holds something else.
        """
        self.checkpoint.save_pretrained(directory)

    def push_to_hub(self, repository: str, *, revision: str | None = None, private: bool | None = None) -> str:
        """Upload the hypernetwork's checkpoint, and its card: see `HypernetworkCheckpoint.push_to_hub`.

        Returns:
            The address of the commit.

        Raises:
            InputError: the hub is out of reach, or does not let the user do that.
        """
        return self.checkpoint.push_to_hub(repository, revision=revision, private=private)

    def _laid_out(
        self, questions: Sequence[str], passages: Passages | None, gates: Gates, mode: str, room: int = 0
    ) -> list[_Row]:
        """Questions as the LLM reads them, with so many tokens left for what follows."""
        check_value("mode", mode)
        if isinstance(questions, str):
            raise InputError("questions are a list; give [question] for one")
        used = None if mode == "closed_book" else passages
        given = [()] * len(questions) if used is None else _checked_passages(used, len(questions))
        checked = _checked_gates(given, None if used is None else gates)
        most = context_length(self.llm) - room
        rows = []
        for question, own, weights in zip(questions, given, checked, strict=True):
            cut = tuple(cut_passages(own, self.tokenizer))
            prompt = in_mode(
                mode,
                closed_book_prompt(question),
                question,
                cut,
                fits=lambda text: len(self._ids(text)) <= most,
                bos=self.tokenizer.bos_token,
            )
            ids = self._ids(prompt.text)
            start = expert_start(prompt.question_at, prompt.text, len(ids), self.tokenizer)
            rows.append(_Row(question, prompt.text, ids, prompt.passages, cut, tuple(weights), start))
        return rows

    def _batches(self, rows: Sequence[_Row], mode: str, size: int) -> Iterator[list[int]]:
        """Numbers of rows of like length, the longest first; their experts are made ahead of the first."""
        if size < 1:
            raise InputError(f"batch_size={size}: give a whole number of at least 1")
        if mode in EXPERT_MODES:
            self._store.prepare((passage for row in rows for passage in row.passages), progress=False)
        order = sorted(range(len(rows)), key=lambda number: -len(rows[number].ids))
        for begin in range(0, len(order), size):
            yield order[begin : begin + size]

    @contextmanager
    def _with_experts(self, rows: Sequence[_Row], mode: str) -> Iterator[None]:
        if mode not in EXPERT_MODES:
            yield
            return
        experts = self._store.rows(
            [row.passages for row in rows], [row.gates for row in rows], [row.start for row in rows]
        )
        with inject(self.llm, self._store.layers, experts):
            yield

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text)["input_ids"]

    @property
    def _padding(self) -> int:
        tokenizer = self.tokenizer
        found = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        return 0 if found is None else int(found)

    def _encoded(self, rows: Sequence[_Row]) -> dict[str, torch.Tensor]:
        """Token ids and mask, padded on the left, on the LLM's device."""
        most = max(len(row.ids) for row in rows)
        ids = torch.tensor([[self._padding] * (most - len(row.ids)) + row.ids for row in rows])
        mask = torch.tensor([[0] * (most - len(row.ids)) + [1] * len(row.ids) for row in rows])
        return {"input_ids": ids.to(self.llm.device), "attention_mask": mask.to(self.llm.device)}


def _checked_passages(passages: Passages, questions: int) -> list[Sequence[str]]:
    """Passages as they were given.

    Raises:
        InputError: they are not a list for each question, or one is no text.
    """
    given = list(passages)
    if isinstance(passages, str) or any(isinstance(own, str) for own in given):
        raise InputError("passages are a list for each question; give [[passage, passage]] for one question")
    if len(given) != questions:
        raise InputError(f"{questions} questions, but passages for {len(given)}")
    for number, own in enumerate(given):
        if any(not isinstance(passage, str) or not passage.strip() for passage in own):
            raise InputError(f"question {number}: a passage is no text, or an empty one; leave it out")
    return given


def _checked_gates(passages: Passages, gates: Gates) -> Sequence[Sequence[float]]:
    """Gates as they were given, or equal ones that add up to 1.

    Raises:
        InputError: they are not as many as the passages, or one is negative or no number.
    """
    if gates is None:
        return [uniform(len(own)) for own in passages]
    if [len(own) for own in gates] != [len(own) for own in passages]:
        raise InputError("gates have to be as many as the passages, for every question")
    if any(not 0 <= gate < math.inf for own in gates for gate in own):
        raise InputError("a gate is negative or no number; give numbers from 0 on")
    return gates
