"""The questions of NQ-open and TriviaQA on the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from genpoe_plugin.errors import InputError
from genpoe_plugin.questions import Question

NQ_OPEN, TRIVIA_QA = "google-research-datasets/nq_open", "mandarjoshi/trivia_qa"


class _Form(NamedTuple):
    config: str | None
    answers: Callable[[Mapping[str, Any]], list[str]]


_FORMS = {
    NQ_OPEN: _Form(None, lambda row: row["answer"]),
    # An answer is the value or any of its aliases.
    TRIVIA_QA: _Form("unfiltered.nocontext", lambda row: [row["answer"]["value"], *row["answer"]["aliases"]]),
}


def read_hub_questions(name: str, split: str) -> Iterator[Question]:
    """The questions of a split of `NQ_OPEN` or `TRIVIA_QA`, each answer once; later runs find them in the hub's cache.

    Raises:
        InputError: the hub cannot be reached, and the cache does not have the data set.
    """
    import datasets  # seconds

    form = _FORMS[name]
    try:
        rows = datasets.load_dataset(name, form.config, split=split)
    except (OSError, ValueError) as error:  # not reachable, not there, or offline and not in the cache
        reason = str(error).split("\n", 1)[0]
        raise InputError(f"cannot load {name} from the hub ({reason})") from error
    for row in rows:
        yield Question(row["question"], tuple(dict.fromkeys(form.answers(row))))
