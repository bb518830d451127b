"""Side channels past lm-eval: they assign each row of a batch its experts, although lm-eval passes on only tokens.

A model class of lm-eval receives requests; its LLM receives batches of token ids. In between, lm-eval sorts, truncates
and batches prompts, and its code does not know about passages. Each class here carries one thing past that code:

- `PlacedContext` is a prompt string with attributes that identify its request. lm-eval's class for transformers sorts
  and batches prompts and passes on only the strings.
- `OriginalKeys` wraps the response cache. lm-eval stores an answer under the prompt that the LLM received, with
  passages, but looks it up under the prompt that the task made.
- `Windows` assigns the windows of rolling log-likelihoods to their requests. lm-eval requests their scores without the
  strings, so only their order identifies them.
- `BatchExperts` holds the experts of the current batch on transformers. lm-eval makes a batch in one method and runs
  the LLM in another, which receives only token ids. The batches of its search for the largest batch size belong to no
  request.

Where only the order identifies a row, its token ids are compared as well. If another version of lm-eval uses another
order, the run stops with an error, and no row gets the experts of another row.
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
"""The selection of a row, and the first of its tokens that the experts act on."""


class PlacedContext(str):
    """A prompt as the LLM reads it.

    Attributes:
        original: the prompt that the task made.
        selection: the passages and gates of the request.
        question_at: character position of the question; None if there is no passage before it.
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
    """Stores answers under the prompts that the task made."""

    def __init__(self, hook: CacheHook) -> None:
        self.dbdict = hook.dbdict

    def add_partial(self, attr: str, req: Iterable[Any], res: Any) -> None:
        super().add_partial(attr, [getattr(part, "original", part) for part in req], res)


class Windows:
    """The selections of the windows of rolling log-likelihoods, in the order in which lm-eval scores them."""

    def __init__(self, owners: Iterable[Selection] = ()) -> None:
        self._owners = deque(owners)

    def next(self) -> Selection:
        """The selection of the next window.

        A data-parallel process with fewer windows than the others adds windows and drops their scores. These get the
        last selection.
        """
        return self._owners.popleft() if len(self._owners) > 1 else self._owners[0]


class BatchExperts:
    """The experts of the next batch of an LLM on transformers.

    Args:
        store: the expert store.
        model: the LLM.
        layers: the layers with experts.
    """

    def __init__(self, store: ExpertStore, model: PreTrainedModel, layers: Sequence[int]) -> None:
        self._store, self._model, self._layers = store, model, layers
        self.rows: RowExperts | None = None
        self._expected: list[list[int]] | None = None
        self._widest: Selection | None = None
        self._probing = False

    def foresee(self, selections: Sequence[Selection]) -> None:
        """Record the selections of all requests, for `probing`."""
        self._widest = max(selections, key=lambda selection: len(selection.strings), default=None)

    def prepare(self, rows: Sequence[Row], tokens: Sequence[Sequence[int]] | None = None) -> None:
        """Load the experts of the next batch.

        Args:
            rows: the rows of the batch.
            tokens: the first token ids of each row, to compare; None if lm-eval cannot have changed the order.
        """
        self.rows = None  # frees the experts of the previous batch first
        self.rows = self._experts(rows)
        self._expected = None if tokens is None else [list(row) for row in tokens]

    @contextmanager
    def probing(self) -> Iterator[None]:
        """In this context, batches belong to no request; each row gets the largest number of experts of any request."""
        self._probing = True
        try:
            yield
        finally:
            self._probing = False

    @contextmanager
    def injected(self, ids: Tensor) -> Iterator[None]:
        """In this context, the LLM runs with the experts of this batch.

        Args:
            ids: token ids of the batch, ``[rows, tokens]``.
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
