"""Choose the passages and gates of all questions at once, ahead of generation.

The steps: retrieve (for questions without passages) -> cut -> rerank -> control -> keep the best -> gates.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from genpoe_plugin.data.answers import has_answer
from genpoe_plugin.data.passages import Passage
from genpoe_plugin.data.questions import Question, RetrievedPassage, by_rerank_score
from genpoe_plugin.errors import InputError
from genpoe_plugin.prompts import cut_passages
from genpoe_plugin.selection import controls
from genpoe_plugin.selection.gates import passage_gates
from genpoe_plugin.selection.timing import timed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from genpoe_plugin.retrieval.passage_store import PassageStore
    from genpoe_plugin.retrieval.retriever import Retriever
    from genpoe_plugin.selection.reranking import Scorer

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Selection:
    """The passages and gates that one question is answered with.

    Attributes:
        task: name of the question's task.
        question: the question, with any passages that its doc contains.
        retrieved: the candidate passages, best first; empty for controls without retrieval.
        passages: the selected passages, best first.
        strings: the selected passages' strings, cut to 256 tokens; read by reranker,
            hypernetwork, prompt and expert store.
        gates: one gate per selected passage; they add up to 1.
    """

    task: str
    question: Question
    retrieved: tuple[RetrievedPassage, ...] = ()
    passages: tuple[RetrievedPassage, ...] = ()
    strings: tuple[str, ...] = ()
    gates: tuple[float, ...] = ()


class Pipeline:
    """Selects the passages of every question and computes their gates.

    Args:
        tokenizer: the LLM's tokenizer, used to cut passages.
        retriever: retrieves passages for questions without any.
        reranker: reranks the candidates. Without one, they are sorted by rerank scores from the input, or else keep the
            retriever's order.
        num_retrieved, num_passages: largest number of passages before and after reranking.
        gates, gate_temperature: how the selected passages' gates are computed (`passage_gates`). Passages of the
            controls that draw them have no scores, so their gates are equal.
        control: which passages to select, one of ``controls.CONTROLS``. ``gold`` selects among all candidates;
            ``random`` and ``constant`` draw from the retriever's passages, or else from the passages of all questions.
        seed: seed of the controls.
        progress: whether to show progress bars.
        from_others: sends a list to the other processes that share the questions and returns their lists, joined.
            `select` calls it once if the control mixes questions, so that the result is that of a single process.

    Attributes:
        seconds: time spent so far in ``retrieve`` and ``rerank``, in seconds.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        retriever: Retriever | None = None,
        reranker: Scorer | None = None,
        *,
        num_retrieved: int = 20,
        num_passages: int = 4,
        gates: str = "softmax",
        gate_temperature: float = 1.0,
        control: str = "retrieved",
        seed: int = 0,
        progress: bool = True,
        from_others: Callable[[list[Any]], list[Any]] = lambda _: [],
    ) -> None:
        self.tokenizer = tokenizer
        self.retriever = retriever
        self.reranker = reranker
        self.num_retrieved = num_retrieved
        self.num_passages = num_passages
        self.gates = gates
        self.gate_temperature = gate_temperature
        self.control = control
        self.seed = seed
        self.progress = progress
        self.from_others = from_others
        self.seconds = {"retrieve": 0.0, "rerank": 0.0}
        self._strings: dict[str, str] = {}

    def select(self, tasks: Sequence[str], questions: Sequence[Question]) -> list[Selection]:
        """Select the passages of each question.

        Args:
            tasks: name of each question's task.
            questions: the questions.

        Returns:
            One selection per question, in the same order.

        Raises:
            InputError: a passage has no text, or no score that its gate needs; there is neither an index nor a question
                with passages; or the control is impossible with these questions.
        """
        if self.control == "none" or not questions:
            return [Selection(task, question) for task, question in zip(tasks, questions, strict=True)]
        if self.retriever is None and not any(question.passages for question in questions):
            raise InputError(
                f"no question of {', '.join(sorted(set(tasks)))} has passages (`ctxs`) and there is no index; "
                "give index=DIRECTORY, made by `genpoe index build`"
            )
        if self.control in ("random", "constant"):
            retrieved: list[tuple[RetrievedPassage, ...]] = [()] * len(questions)
            selected, gates = self._draw(questions), "uniform"
        else:
            retrieved, gates = self._rerank(questions, self._retrieve(questions)), self.gates
            selected = self._choose(tasks, questions, retrieved)
        if without := sum(not passages for passages in selected):
            _log.warning("%d of %d questions have no passages and are answered without", without, len(selected))
        self._cut(selected)
        return [
            Selection(
                task=task,
                question=question,
                retrieved=candidates,
                passages=passages,
                strings=tuple(self._strings[passage.passage.string] for passage in passages),
                gates=passage_gates(question.question, passages, gates, self.gate_temperature),
            )
            for task, question, candidates, passages in zip(tasks, questions, retrieved, selected, strict=True)
        ]

    def _retrieve(self, questions: Sequence[Question]) -> list[tuple[RetrievedPassage, ...]]:
        retrieved: dict[str, tuple[RetrievedPassage, ...]] = {}
        if self.retriever is not None:
            queries = list(dict.fromkeys(question.question for question in questions if not question.passages))
            with timed(self.seconds, "retrieve"):
                passages = self.retriever.retrieve(queries, self.num_retrieved, progress=self.progress)
            retrieved = dict(zip(queries, passages, strict=True))
        return [
            tuple(
                passage if passage.has_answer is not None else _labelled(passage, question)
                for passage in question.passages[: self.num_retrieved] or retrieved.get(question.question, ())
            )
            for question in questions
        ]

    def _rerank(
        self, questions: Sequence[Question], retrieved: list[tuple[RetrievedPassage, ...]]
    ) -> list[tuple[RetrievedPassage, ...]]:
        self._cut(retrieved)
        if self.reranker is None:
            return [by_rerank_score(passages) for passages in retrieved]
        from genpoe_plugin.selection.reranking import rerank  # imported only if there is a reranker

        unranked = [replace(question, passages=own) for question, own in zip(questions, retrieved, strict=True)]
        with timed(self.seconds, "rerank"):
            ranked = rerank(unranked, self.reranker, strings=self._strings, progress=self.progress)
        return [question.passages for question in ranked]

    def _choose(
        self, tasks: Sequence[str], questions: Sequence[Question], retrieved: Sequence[tuple[RetrievedPassage, ...]]
    ) -> list[tuple[RetrievedPassage, ...]]:
        if self.control == "gold":
            if all(passage.has_answer is None for passages in retrieved for passage in passages):
                raise InputError("passages=gold needs docs with `answers`, or passages with `has_answer`")
            retrieved = [controls.gold(passages) for passages in retrieved]
        selected = [passages[: self.num_passages] for passages in retrieved]
        if self.control != "shuffled":
            return selected
        all_questions = [
            (task, replace(question, passages=passages))
            for task, question, passages in zip(tasks, questions, selected, strict=True)
        ]
        all_questions += self.from_others(all_questions)
        rows_of: defaultdict[str, list[int]] = defaultdict(list)
        for row, (task, _) in enumerate(all_questions):
            rows_of[task].append(row)
        for rows in rows_of.values():
            shuffled = controls.shuffled([all_questions[row][1] for row in rows], self.seed)
            for row, passages in zip(rows, shuffled, strict=True):
                if row < len(selected):
                    selected[row] = tuple(_labelled(passage, questions[row]) for passage in passages)
        return selected

    def _draw(self, questions: Sequence[Question]) -> list[tuple[RetrievedPassage, ...]]:
        pool: controls.Pool
        if self.retriever is not None:
            pool = _StoredPool(self.retriever.passages)
        else:
            unique = {passage.passage for question in questions for passage in question.passages}
            unique |= set(self.from_others(list(unique)))
            pool = sorted(unique, key=lambda passage: (passage.string, passage.id))
        if self.control == "constant":
            passages = controls.constant(pool, self.seed)
            drawn = [passages] * len(questions)
        else:
            drawn = [controls.random_passages(question, pool, self.num_passages, self.seed) for question in questions]
        return [
            tuple(_labelled(passage, question) for passage in passages)
            for question, passages in zip(questions, drawn, strict=True)
        ]

    def _cut(self, rows: Sequence[Sequence[RetrievedPassage]]) -> None:
        """Cut every new passage and store its cut string."""
        new = {entry.passage.string: entry.passage for row in rows for entry in row}
        new = {string: passage for string, passage in new.items() if string not in self._strings}
        for passage in new.values():
            if not passage.text.strip():
                raise InputError(f"passage {passage.id!r} has no text; remove it")
        self._strings.update(zip(new, cut_passages(list(new), self.tokenizer), strict=True))


@dataclass(frozen=True, slots=True)
class _StoredPool:
    """The passages of an index, to draw from."""

    passages: PassageStore

    def __len__(self) -> int:
        return len(self.passages)

    def __getitem__(self, number: int, /) -> Passage:
        return self.passages.passage(number)


def _labelled(passage: RetrievedPassage, question: Question) -> RetrievedPassage:
    """Set ``has_answer`` of the passage for this question; None if the question's answers are unknown."""
    label = has_answer(passage.passage.text, question.answers) if question.answers else None
    return replace(passage, has_answer=label)
