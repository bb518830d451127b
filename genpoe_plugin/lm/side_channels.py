"""What travels beside lm-eval: which row of a batch has which experts, where lm-eval hands on prompts and tokens alone.

A model class of lm-eval gets requests, and its LLM gets batches of token ids. In between, lm-eval sorts, cuts and
batches with code that knows nothing of passages. Each class here gets something past a place where that code drops it:

- `PlacedContext` is a string to lm-eval and remembers its request. lm-eval's class on transformers sorts and batches
  prompts and keeps nothing but the strings, so what a string knows is all that is known of a row.
- `OriginalKeys` stands between the LLM and the response cache. lm-eval files each answer under the prompt that the LLM
  was given, with passages in it, and later looks under the prompt that the task made.
- `Windows` says whose a window of a running text is. lm-eval asks for the likelihood of windows without any string, so
  their order is all that tells them apart.
- `BatchExperts` holds the experts of a batch on transformers. lm-eval makes a batch in one method and runs the LLM in
  another, which is given the token ids alone; and a batch that it makes up, to find the largest that fits in memory, is
  of no request at all.
- `EngineOrder` foresees the order of requests on vLLM. lm-eval's class for vLLM sorts them between the method that
  still has the strings and the one that calls the engine.

Where order is all there is, the token ids are compared on the way, so that another order in another version of lm-eval
is an error, and no row gets another row's experts. What leaves a run beside lm-eval's results has its own module,
`genpoe_plugin.lm.saved_results`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lm_eval.api.model import CacheHook
from torch import Tensor
from transformers import PreTrainedModel

from genpoe_plugin.experts.injection import RowExperts, inject
from genpoe_plugin.experts.store import ExpertStore
from genpoe_plugin.prompts import Prompt
from genpoe_plugin.selection.pipeline import Selection

Row = tuple[Selection, int]
"""The passages of a row, and the first of its tokens that sees their experts."""


class PlacedContext(str):
    """A prompt as the LLM reads it.

    Attributes:
        original: the prompt as the task made it.
        selection: the passages that its request is answered with.
        question_at: the character where the question begins; None where no passage stands before it.
    """

    original: str
    selection: Selection
    question_at: int | None

    def __new__(cls, prompt: Prompt, original: str, selection: Selection) -> PlacedContext:
        placed = super().__new__(cls, prompt.text)
        placed.original = original
        placed.selection = selection
        placed.question_at = prompt.question_at
        return placed


class OriginalKeys(CacheHook):
    """Files answers under the prompts as the task made them."""

    def __init__(self, hook: CacheHook) -> None:
        self.dbdict = hook.dbdict

    def add_partial(self, attr: str, req: Iterable[Any], res: Any) -> None:
        super().add_partial(attr, [getattr(part, "original", part) for part in req], res)


class Windows:
    """Whose the windows of running texts are, in the order in which lm-eval asks for their scores."""

    def __init__(self, owners: Iterable[Selection] = ()) -> None:
        self._owners = deque(owners)

    def next(self) -> Selection:
        """That of the next window.

        A data-parallel process with fewer windows than others adds some, whose scores it drops; any will do for those.
        """
        return self._owners.popleft() if len(self._owners) > 1 else self._owners[0]


class BatchExperts:
    """The experts of the batch that the LLM on transformers runs next.

    Args:
        store: makes and keeps experts.
        model: the LLM.
        layers: those with experts.
    """

    def __init__(self, store: ExpertStore, model: PreTrainedModel, layers: Sequence[int]) -> None:
        self._store, self._model, self._layers = store, model, layers
        self.rows: RowExperts | None = None
        self._expected: list[list[int]] | None = None
        self._widest: Selection | None = None
        self._probing = False

    def foresee(self, selections: Sequence[Selection]) -> None:
        """Note the passages of all requests to come, for `probing`."""
        self._widest = max(selections, key=lambda selection: len(selection.strings), default=None)

    def prepare(self, rows: Sequence[Row], tokens: Sequence[Sequence[int]] | None = None) -> None:
        """Make the experts of the next batch ready.

        Args:
            rows: those of the batch.
            tokens: what each of them will begin with, to be compared; None where lm-eval cannot have changed the order.
        """
        self.rows = None  # those of the last batch, or for a moment both would be in memory
        self.rows = self._experts(rows)
        self._expected = None if tokens is None else [list(row) for row in tokens]

    @contextmanager
    def probing(self) -> Iterator[None]:
        """Inside, batches are of no request, and every row has as many experts as any of the requests to come."""
        self._probing = True
        try:
            yield
        finally:
            self._probing = False

    @contextmanager
    def injected(self, ids: Tensor) -> Iterator[None]:
        """Inside, the LLM has the experts of this batch.

        Args:
            ids: the batch, ``[rows, tokens]``.
        """
        rows = self.rows
        if self._probing:
            rows = self._experts([(self._widest, 0)] * len(ids)) if self._widest else None
        elif self._expected is not None:
            seen = [row[: len(tokens)].tolist() for row, tokens in zip(ids, self._expected, strict=True)]
            assert seen == self._expected, "a batch is in another order than its experts"
        assert rows is None or len(rows.start) == len(ids), "a batch has other rows than its experts"
        with inject(self._model, self._layers, rows):
            yield

    def _experts(self, rows: Sequence[Row]) -> RowExperts | None:
        selections = [selection for selection, _ in rows]
        return self._store.rows(
            [selection.strings for selection in selections],
            [selection.gates for selection in selections],
            [start for _, start in rows],
        )


class EngineOrder:
    """Requests in the order in which lm-eval's class for vLLM hands them to the engine."""

    def __init__(self) -> None:
        self._prompts: deque[tuple[PlacedContext, list[int]]] = deque()
        self._scored: deque[tuple[Row, list[int]]] = deque()

    def foresee_prompts(self, prompts: Sequence[PlacedContext], ids: Sequence[list[int]]) -> None:
        """Prompts to generate from, with their token ids."""
        rows = zip(prompts, ids, strict=True)
        self._prompts = deque(sorted(rows, key=lambda row: (-len(row[1]), row[0])))

    def foresee_scored(self, rows: Iterable[tuple[Row, list[int]]]) -> None:
        """Rows to score, with their token ids."""
        self._scored = deque(sorted(rows, key=lambda row: (-len(row[1]), tuple(row[1]))))

    def next_prompt(self, ids: list[int]) -> PlacedContext:
        """That of the next request, whose token ids lm-eval may have cut."""
        prompt, whole = self._prompts.popleft()
        assert ids == whole or len(ids) < len(whole), "requests are in another order than their experts"
        return prompt

    def next_scored(self, ids: list[int]) -> Row:
        """That of the next request, whose token ids lm-eval may have cut on the left."""
        row, whole = self._scored.popleft()
        assert ids == whole[len(whole) - len(ids) :], "requests are in another order than their experts"
        return row
