"""The Python interface: generate and score answers with experts, or use experts in a custom decoding loop."""

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
"""For each question, a list of passages, best first, as ``title: text`` or as text alone; each is cut to 256 tokens."""
Gates = Sequence[Sequence[float]] | None
"""For each question, a list with one gate per passage; None for equal gates."""
_OTHER_OUTPUTS = ("num_return_sequences", "return_dict_in_generate")


@dataclass(frozen=True, slots=True)
class _Row:
    """One question, ready for the LLM.

    Attributes:
        question: the question, as given.
        prompt: the prompt, as text.
        ids: token ids of the prompt.
        num_in_prompt: number of passages in the prompt.
        passages: the passages, cut; in modes with experts, each becomes an expert.
        gates: one gate per passage.
        start: the first position that the experts act on.
    """

    question: str
    prompt: str
    ids: list[int]
    num_in_prompt: int
    passages: tuple[str, ...]
    gates: tuple[float, ...]
    start: int


class GenPoEModel:
    """A frozen decoder LLM and a hypernetwork that generates experts for it.

    The LLM's weights never change: experts act only during a call, or inside a block of `experts`. With the same
    passages and gates, ``lm_eval --model genpoe`` gives the same answers.

    Args:
        llm: decoder LLM, as loaded by `transformers`; it is put into evaluation mode.
        tokenizer: fast tokenizer of the LLM.
        hypernetwork: checkpoint of a hypernetwork for this LLM: a directory, a hub repository as ``user/name`` or
            ``user/name@revision``, or a `HypernetworkCheckpoint`.
        revision: revision of the hypernetwork's repository (branch, tag or commit), if it is not part of its name.
        expert_dtype: dtype in which experts are stored: ``float32``, ``bfloat16``, ``float16`` or, for experts in the
            attention, ``int8``. By default the LLM's dtype.

    Attributes:
        llm: the LLM.
        tokenizer: the LLM's tokenizer.
        hypernetwork: the hypernetwork.
        checkpoint: the hypernetwork's checkpoint, with its directory and commit.

    Raises:
        InputError: the checkpoint is missing, damaged, or for another LLM; the tokenizer is not a fast one; or
            ``expert_dtype`` is invalid.
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
        """Load a hypernetwork, and its LLM unless that is already loaded.

        Args:
            llm: a directory, a hub repository as ``user/name`` or ``user/name@revision``, or a loaded LLM.
            hypernetwork: checkpoint of a hypernetwork for this LLM: a directory, a hub repository as ``user/name`` or
                ``user/name@revision``, or a `HypernetworkCheckpoint`.
            tokenizer: tokenizer of a loaded LLM. The tokenizer of an LLM that is given by name is loaded with it.
            revision: revision of the hypernetwork's repository (branch, tag or commit), if it is not part of its name.
            device: device of the LLM, such as ``cuda:1``; ``cpu`` by default. Only for an LLM that is given by name.
            dtype: dtype of the LLM: ``float32``, ``bfloat16``, ``float16``, or ``auto`` (the default) for the dtype in
                which it is stored. Only for an LLM that is given by name.
            expert_dtype: dtype in which experts are stored; see the class.
            gguf_file: name of a GGUF file in the LLM's directory or repository to load the LLM from.
            trust_remote_code: whether to run code from the LLM's repository.

        Raises:
            InputError: a model cannot be loaded, the hypernetwork is for another LLM, a loaded LLM has no tokenizer, or
                an argument does not fit the kind of ``llm``.
        """
        if isinstance(llm, str | Path):
            if tokenizer is not None:
                raise InputError("tokenizer: an LLM that is given by name is loaded with its own; leave it out")
            model, tokenizer = load_language_model(
                str(llm),
                device=device or "cpu",
                dtype=dtype or "auto",
                gguf_file=gguf_file,
                trust_remote_code=trust_remote_code,
            )
        else:
            model = llm
            loader_options = {"device": device, "dtype": dtype, "gguf_file": gguf_file}
            if unused := [name for name, value in loader_options.items() if value is not None]:
                raise InputError(f"{unused[0]}={loader_options[unused[0]]}: the LLM is already loaded; leave it out")
            if tokenizer is None:
                raise InputError("a loaded LLM needs its tokenizer; give tokenizer=")
        return cls(model, tokenizer, hypernetwork, revision=revision, expert_dtype=expert_dtype)

    @staticmethod
    def gates(scores: Sequence[Sequence[float]], gate_temperature: float = 1.0) -> list[tuple[float, ...]]:
        """Compute gates from the scores of a reranker or a retriever, as an evaluation does.

        Args:
            scores: for each question, one score per passage; higher is better.
            gate_temperature: temperature of the softmax, above 0. A large one makes all gates equal; with a small one,
                only the best passage counts.

        Returns:
            For each question, one gate per score; the gates of a question add up to 1.

        Raises:
            InputError: a score is not a finite number, or the temperature is not a finite number above 0.
        """
        check_value("gate_temperature", gate_temperature)
        for number, question_scores in enumerate(scores):
            if not all(math.isfinite(score) for score in question_scores):
                raise InputError(f"question {number}: a score is not a finite number; give one for every passage")
        return [softmax(question_scores, gate_temperature) for question_scores in scores]

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
        """Generate answers to questions.

        Args:
            questions: a list of questions. In the prompt, the first letter is capitalised and a missing question mark
                is added.
            passages: for each question, a list of passages, best first, as ``title: text`` or as text alone; each is
                cut to 256 tokens. A question without passages is answered by the LLM alone.
            gates: for each question, one weight per passage, such as those from `gates`; by default equal weights that
                add up to 1.
            mode: ``closed_book``, ``rag`` (passages in the prompt), ``genpoe`` (passages as experts) or ``genpoe_rag``
                (both). If a prompt is too long for the LLM, passages are left out of it, the last ones first.
            batch_size: number of questions per batch.
            **generation: further arguments of the LLM's ``generate``. The defaults are those of the tasks of
                ``lm_eval``: greedy decoding, at most 32 new tokens, and a stop string (``stop_strings``) that ends the
                answer at a new line with ``Question:``.

        Returns:
            For each question, the generated text before the stop string; its first line is the answer.

        Raises:
            InputError: there is no such mode, lists differ in length, a gate is negative or not finite, or
                ``generation`` asks for anything other than one text per question.
        """
        if wrong := [name for name in _OTHER_OUTPUTS if generation.get(name) not in (None, False, 1)]:
            raise InputError(f"{wrong[0]}={generation[wrong[0]]}: there is one text per question; leave it out")
        options: dict[str, Any] = {"do_sample": False, "pad_token_id": self._padding, "stop_strings": [STOP]}
        if "max_length" not in generation:
            options["max_new_tokens"] = MAX_NEW_TOKENS
        options |= generation
        stops = options.get("stop_strings") or []
        stops = [stops] if isinstance(stops, str) else list(stops)
        options["stop_strings"] = stops or None
        rows = self._build_rows(questions, passages, gates, mode, options.get("max_new_tokens") or 0)
        answers = [""] * len(rows)
        for numbers in self._batches(rows, mode, batch_size):
            batch_rows = [rows[number] for number in numbers]
            inputs = self._inputs(batch_rows)
            with self._with_experts(batch_rows, mode):
                generated = self.llm.generate(**inputs, **options, tokenizer=self.tokenizer)
            new_tokens = generated[:, inputs["input_ids"].shape[1] :]
            texts = self.tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
            for number, text in zip(numbers, texts, strict=True):
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
        """Compute the log-likelihood of one given answer per question.

        Args:
            questions: a list of questions, as for `generate`.
            answers: for each question, the answer to score; a space is added before it.
            passages: for each question, a list of passages, as for `generate`.
            gates: for each question, one weight per passage, as for `generate`.
            mode: mode of the prompt and the experts, as for `generate`.
            batch_size: number of questions per batch.

        Returns:
            For each question, the log-likelihood of the answer in nats, summed over its tokens.

        Raises:
            InputError: there is no such mode, lists differ in length, an answer is empty, or a gate is negative or not
                finite.
        """
        if isinstance(answers, str) or len(answers) != len(questions):
            raise InputError(f"{len(questions)} questions, but {len(answers)} answers; give a list with one for each")
        if empty := [number for number, answer in enumerate(answers) if not answer.strip()]:
            raise InputError(f"answer {empty[0]} is empty")
        longest = max((len(self._ids(answer)) for answer in answers), default=0)
        rows = self._build_rows(questions, passages, gates, mode, longest)
        scores = [0.0] * len(rows)
        for numbers in self._batches(rows, mode, batch_size):
            batch_rows = [rows[number] for number in numbers]
            examples = [
                DrawnExample(
                    row.question, answers[number], row.passages[: row.num_in_prompt], row.gates[: row.num_in_prompt]
                )
                for number, row in zip(numbers, batch_rows, strict=True)
            ]
            batch = make_batch(examples, mode in PROMPT_MODES, self.tokenizer, end="")
            with self._with_experts(batch_rows, mode):
                logits = answer_logits(self.llm, batch, self.llm.device)
            losses = token_losses(logits, batch.labels.to(logits.device)).sum(1)
            for number, loss in zip(numbers, losses.tolist(), strict=True):
                scores[number] = -loss
        return scores

    @property
    def has_router(self) -> bool:
        """Whether the experts are in the LLM's attention, which then weights them."""
        return (self.hypernetwork.config.head, self.hypernetwork.config.place) == ("attention", "attention")

    @torch.no_grad()
    def router_mass(self, questions: Sequence[str], passages: Passages, gates: Gates = None) -> list[list[float]]:
        """Compute the share of the attention that each passage receives from the last token of the prompt.

        Args:
            questions: a list of questions, as for `generate`.
            passages: for each question, a list of at least one passage.
            gates: for each question, one weight per passage, as for `generate`.

        Returns:
            For each question, one share per passage, as a mean over heads and layers with experts. The rest up to 1 is
            the share of the prompt itself.

        Raises:
            InputError: the experts are not in the attention, a question has no passage, or lists differ in length.
        """
        if not self.has_router:
            raise InputError("only experts in the attention have a router; experts beside an MLP have gates alone")
        rows = self._build_rows(questions, passages, gates, "genpoe")
        if empty := [number for number, row in enumerate(rows) if not row.passages]:
            raise InputError(f"question {empty[0]} has no passage")
        shares = []
        for row in rows:
            with self._with_experts([row], "genpoe"), observe_router() as masses:
                self.llm(**self._inputs([row]))
            unit_shares = torch.stack([mass.cpu() for mass in masses.values()]).mean(0)[0]
            of_passages = unit_shares.split(self._store.units(row.passages))
            shares.append([float(of_passage.sum()) for of_passage in of_passages])
        return shares

    @contextmanager
    def experts(self, passages: Passages, gates: Gates = None, start: Sequence[int] | None = None) -> Iterator[None]:
        """Add experts to every forward pass of the LLM inside the block, for a custom decoding loop.

        Args:
            passages: for each row of the batch, a list of passages. With beam search, the batch has a multiple of these
                rows.
            gates: for each row, one weight per passage; by default equal weights that add up to 1.
            start: for each row, the first position (padding not counted) that its experts act on; 0 by default. If the
                prompt contains passages, give the position of the question.

        Raises:
            InputError: lists differ in length, or a gate is negative or not finite.
        """
        passage_lists = _checked_passages(passages, len(passages))
        cut = [tuple(cut_passages(row_passages, self.tokenizer)) for row_passages in passage_lists]
        if start is not None and len(start) != len(cut):
            raise InputError(f"passages for {len(cut)} rows, but start positions for {len(start)}")
        rows = self._store.rows(cut, _checked_gates(cut, gates), [0] * len(cut) if start is None else start)
        with inject(self.llm, self._store.layers, rows):
            yield

    def save_pretrained(self, directory: str | Path) -> None:
        """Copy the hypernetwork's checkpoint and its card to a directory; the LLM is not saved.

        Args:
            directory: directory to write to; an older checkpoint in it is replaced.

        Raises:
            InputError: the directory holds something that is not a checkpoint.
        """
        self.checkpoint.save_pretrained(directory)

    def push_to_hub(self, repository: str, *, revision: str | None = None, private: bool | None = None) -> str:
        """Upload the hypernetwork's checkpoint and its card to the hub; the LLM is not uploaded.

        The upload needs a token, in ``HF_TOKEN`` or from ``hf auth login``.

        Args:
            repository: ``user/name``, or a name in the user's own namespace; it is created if it does not exist.
            revision: branch to upload to; it is created if it does not exist. By default the main branch.
            private: whether a new repository is private; by default the hub decides.

        Returns:
            The URL of the commit.

        Raises:
            InputError: the hub is unreachable, or refuses the upload.
        """
        return self.checkpoint.push_to_hub(repository, revision=revision, private=private)

    def _build_rows(
        self, questions: Sequence[str], passages: Passages | None, gates: Gates, mode: str, answer_tokens: int = 0
    ) -> list[_Row]:
        """Build prompts that leave room for ``answer_tokens`` tokens of an answer."""
        check_value("mode", mode)
        if isinstance(questions, str):
            raise InputError("questions must be a list; give [question] for one question")
        if passages is None or mode == "closed_book":
            passages, gates = [()] * len(questions), None
        passage_lists = _checked_passages(passages, len(questions))
        gate_lists = _checked_gates(passage_lists, gates)
        max_prompt_tokens = context_length(self.llm) - answer_tokens
        rows = []
        for question, question_passages, question_gates in zip(questions, passage_lists, gate_lists, strict=True):
            cut = tuple(cut_passages(question_passages, self.tokenizer))
            prompt = in_mode(
                mode,
                closed_book_prompt(question),
                question,
                cut,
                fits=lambda text: len(self._ids(text)) <= max_prompt_tokens,
                bos=self.tokenizer.bos_token,
            )
            ids = self._ids(prompt.text)
            start = expert_start(prompt.question_at, prompt.text, len(ids), self.tokenizer)
            rows.append(_Row(question, prompt.text, ids, prompt.passages, cut, tuple(question_gates), start))
        return rows

    def _batches(self, rows: Sequence[_Row], mode: str, size: int) -> Iterator[list[int]]:
        """Prepare the experts of all rows, then yield the numbers of each batch's rows, longest prompts first."""
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
        token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        return 0 if token_id is None else int(token_id)

    def _inputs(self, rows: Sequence[_Row]) -> dict[str, torch.Tensor]:
        """Token ids and mask, padded on the left, on the LLM's device."""
        longest = max(len(row.ids) for row in rows)
        ids = torch.tensor([[self._padding] * (longest - len(row.ids)) + row.ids for row in rows])
        mask = torch.tensor([[0] * (longest - len(row.ids)) + [1] * len(row.ids) for row in rows])
        return {"input_ids": ids.to(self.llm.device), "attention_mask": mask.to(self.llm.device)}


def _checked_passages(passages: Passages, questions: int) -> list[Sequence[str]]:
    """Check the passages of a number of questions, and return them unchanged.

    Raises:
        InputError: they are not one list per question, or a passage is empty or not a string.
    """
    passage_lists = list(passages)
    if isinstance(passages, str) or any(isinstance(item, str) for item in passage_lists):
        raise InputError("passages must be one list per question; give [[passage, passage]] for one question")
    if len(passage_lists) != questions:
        raise InputError(f"{questions} questions, but passages for {len(passage_lists)}")
    for number, question_passages in enumerate(passage_lists):
        if any(not isinstance(passage, str) or not passage.strip() for passage in question_passages):
            raise InputError(f"question {number}: a passage is empty or not a string; leave it out")
    return passage_lists


def _checked_gates(passages: Passages, gates: Gates) -> Sequence[Sequence[float]]:
    """Check the gates and return them unchanged; by default, equal gates that add up to 1.

    Raises:
        InputError: a question does not have one gate per passage, or a gate is negative or not finite.
    """
    if gates is None:
        return [uniform(len(question_passages)) for question_passages in passages]
    if list(map(len, gates)) != list(map(len, passages)):
        raise InputError("the gates do not match the passages; give one gate per passage, for every question")
    if any(not 0 <= gate < math.inf for question_gates in gates for gate in question_gates):
        raise InputError("a gate is negative or not a finite number; give finite numbers of at least 0")
    return gates
