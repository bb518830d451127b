"""From questions to the passages that each is answered with, for all questions at once and ahead of generation.

retrieve (questions that bring no passages) -> cut -> rerank -> control -> keep the best -> gates
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

    from genpoe_plugin.retrieval.index import PassageIndex
    from genpoe_plugin.retrieval.retriever import Retriever
    from genpoe_plugin.selection.reranking import Reranker

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Selection:
    """What one question is answered with.

    task, question: as given; the question's own passages are those that it brought along.
    retrieved: what the passages were chosen from, best first (empty where a control needs no retrieval).
    passages: those kept, best first.
    strings: their strings, cut to 256 tokens: what reranker, hypernetwork, prompt and expert store see.
    gates: one for each of them; they add up to 1.
    """

    task: str
    question: Question
    retrieved: tuple[RetrievedPassage, ...] = ()
    passages: tuple[RetrievedPassage, ...] = ()
    strings: tuple[str, ...] = ()
    gates: tuple[float, ...] = ()


class Pipeline:
    """Chooses the passages of every question and gives them their gates.

    Args:
        tokenizer: the LLM's, by which passages are cut.
        retriever: for questions that bring no passages.
        reranker: orders what was retrieved; without one the order is that of rerank scores that passages brought
            along, else the retriever's.
        num_retrieved, num_passages: how many at most before and after reranking.
        gates, gate_temperature: of the passages kept (`passage_gates`). Passages that are drawn have no scores, so
            their gates are equal.
        control: which passages (``controls.CONTROLS``). ``gold`` chooses among all retrieved; ``random`` and
            ``constant`` draw from the retriever's index, else from all passages that the questions bring along.
        seed: of the controls.
        progress: show progress bars.
        from_others: where several processes share the questions, given what this one has to say to the others, what
            they say. Called once by every ``select`` whose control mixes questions, so that each gets the passages
            that it would get in one process.

    Attributes:
        seconds: time spent so far, by stage.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        retriever: Retriever | None = None,
        reranker: Reranker | None = None,
        *,
        num_retrieved: int = 20,
        num_passages: int = 4,
        gates: str = "softmax",
        gate_temperature: float = 1.0,
        control: str = "retrieved",
        seed: int = 0,
        progress: bool = True,
        from_others: Callable[[list[Any]], list[Any]] = lambda own: [],
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
        """The selection of each question, in their order; ``tasks`` are the names of their tasks.

        Raises:
            InputError: a passage has no text, or no score where its gate has to be made of one; there is neither an
                index nor a question with passages; or the control cannot be carried out.
        """
        if self.control == "none" or not questions:
            return [Selection(task, question) for task, question in zip(tasks, questions, strict=True)]
        if self.retriever is None and not any(question.passages for question in questions):
            raise InputError(
                f"no question of {', '.join(sorted(set(tasks)))} brings passages (`ctxs`) and there is no index; "
                "give index=DIRECTORY, made by `genpoe index build`"
            )
        if self.control in ("random", "constant"):
            retrieved: list[tuple[RetrievedPassage, ...]] = [()] * len(questions)
            kept, gates = self._drawn(questions), "uniform"
        else:
            retrieved, gates = self._rerank(questions, self._retrieve(questions)), self.gates
            kept = self._chosen(tasks, questions, retrieved)
        if without := sum(not passages for passages in kept):
            _log.warning("%d of %d questions have no passages and are answered without", without, len(kept))
        self._cut(kept)
        return [
            Selection(
                task=task,
                question=question,
                retrieved=candidates,
                passages=passages,
                strings=tuple(self._strings[passage.passage.string] for passage in passages),
                gates=passage_gates(question.question, passages, gates, self.gate_temperature),
            )
            for task, question, candidates, passages in zip(tasks, questions, retrieved, kept, strict=True)
        ]

    def _retrieve(self, questions: Sequence[Question]) -> list[tuple[RetrievedPassage, ...]]:
        found: dict[str, tuple[RetrievedPassage, ...]] = {}
        if self.retriever is not None:
            wanted = list(dict.fromkeys(question.question for question in questions if not question.passages))
            with timed(self.seconds, "retrieve"):
                passages = self.retriever.retrieve(wanted, self.num_retrieved, progress=self.progress)
            found = dict(zip(wanted, passages, strict=True))
        return [
            tuple(
                passage if passage.has_answer is not None else _labelled(passage, question)
                for passage in question.passages[: self.num_retrieved] or found.get(question.question, ())
            )
            for question in questions
        ]

    def _rerank(
        self, questions: Sequence[Question], retrieved: list[tuple[RetrievedPassage, ...]]
    ) -> list[tuple[RetrievedPassage, ...]]:
        self._cut(retrieved)
        if self.reranker is None:
            return [by_rerank_score(passages) for passages in retrieved]
        from genpoe_plugin.selection.reranking import rerank  # here, for the other runs do without

        asked = [replace(question, passages=found) for question, found in zip(questions, retrieved, strict=True)]
        with timed(self.seconds, "rerank"):
            ranked = rerank(asked, self.reranker, strings=self._strings, progress=self.progress)
        return [question.passages for question in ranked]

    def _chosen(
        self, tasks: Sequence[str], questions: Sequence[Question], retrieved: Sequence[tuple[RetrievedPassage, ...]]
    ) -> list[tuple[RetrievedPassage, ...]]:
        if self.control == "gold":
            if all(passage.has_answer is None for passages in retrieved for passage in passages):
                raise InputError("passages=gold needs docs with `answers`, or passages with `has_answer`")
            retrieved = [controls.gold(passages) for passages in retrieved]
        kept = [passages[: self.num_passages] for passages in retrieved]
        if self.control != "shuffled":
            return kept
        asked = [
            (task, replace(question, passages=passages))
            for task, question, passages in zip(tasks, questions, kept, strict=True)
        ]
        asked += self.from_others(asked)
        rows_of: defaultdict[str, list[int]] = defaultdict(list)
        for row, (task, _) in enumerate(asked):
            rows_of[task].append(row)
        for rows in rows_of.values():
            given = controls.shuffled([asked[row][1] for row in rows], self.seed)
            for row, passages in zip(rows, given, strict=True):
                if row < len(kept):
                    kept[row] = tuple(_labelled(passage, questions[row]) for passage in passages)
        return kept

    def _drawn(self, questions: Sequence[Question]) -> list[tuple[RetrievedPassage, ...]]:
        pool: controls.Pool
        if self.retriever is not None:
            pool = _IndexPool(self.retriever.index)
        else:
            unique = {passage.passage for question in questions for passage in question.passages}
            unique |= set(self.from_others(list(unique)))
            pool = sorted(unique, key=lambda passage: (passage.string, passage.id))
        if self.control == "constant":
            passages = controls.constant(pool, self.seed)
            drawn = [passages] * len(questions)
        else:
            drawn = [controls.drawn(question, pool, self.num_passages, self.seed) for question in questions]
        return [
            tuple(_labelled(passage, question) for passage in passages)
            for question, passages in zip(questions, drawn, strict=True)
        ]

    def _cut(self, rows: Sequence[Sequence[RetrievedPassage]]) -> None:
        """Note the cut string of every passage, once for each."""
        new = {entry.passage.string: entry.passage for row in rows for entry in row}
        new = {string: passage for string, passage in new.items() if string not in self._strings}
        for passage in new.values():
            if not passage.text.strip():
                raise InputError(f"passage {passage.id!r} has no text; remove it")
        self._strings.update(zip(new, cut_passages(list(new), self.tokenizer), strict=True))


@dataclass(frozen=True, slots=True)
class _IndexPool:
    index: PassageIndex

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, number: int, /) -> Passage:
        return self.index.passage(number)


def _labelled(passage: RetrievedPassage, question: Question) -> RetrievedPassage:
    """Say whether the passage contains an answer to this question; None where its answers are not known."""
    found = has_answer(passage.passage.text, question.answers) if question.answers else None
    return replace(passage, has_answer=found)
