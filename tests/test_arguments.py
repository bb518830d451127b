"""What an evaluation is asked for: values that cannot be, and what the declaration says against what the code does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from genpoe_plugin.arguments import ARGUMENTS, LOADED, NON_DECIDING, GenPoEArguments, control_of, is_used, tells_apart
from genpoe_plugin.comparison.settings import deciding
from genpoe_plugin.data.passages import Passage
from genpoe_plugin.data.questions import Question, RetrievedPassage
from genpoe_plugin.errors import InputError
from genpoe_plugin.prompts import EXPERT_MODES, MODES
from genpoe_plugin.selection.controls import CONTROLS
from genpoe_plugin.selection.pipeline import Pipeline
from tests.selection.test_pipeline import FakeReranker, FakeRetriever


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"mode": "magic"}, "mode=magic: not one of closed_book, rag, genpoe, genpoe_rag"),
        ({"mode": "rag", "gates": "hard"}, "gates=hard: not one of softmax, retriever, uniform"),
        *(
            ({"mode": "rag", "gate_temperature": value}, f"gate_temperature={value}: give a finite number above 0")
            for value in (0, -1.5, "warm", "2", True, float("nan"), float("inf"), 10**400, None)
        ),
        (
            {"mode": "rag", "gate_temperature": 2, "gates": "uniform"},
            "gate_temperature=2 with gates=uniform: they are equal at any temperature; leave it out, or give",
        ),
        (
            {"mode": "rag", "passages": "best"},
            "passages=best: not one of retrieved, gold, shuffled, random, constant, none",
        ),
        ({"mode": "rag", "num_passages": 0}, "num_passages=0: give a whole number of at least 1"),
        ({"mode": "rag", "num_retrieved": 0}, "num_retrieved=0: give a whole number of at least 1"),
        ({"mode": "rag", "num_passages": 2.5}, "num_passages=2.5: give a whole number of at least 1"),
        ({"mode": "rag", "num_passages": True}, "num_passages=True: give a whole number of at least 1"),
        ({"mode": "rag", "num_passages": 30}, "num_passages=30 is more than num_retrieved=20"),
        ({"mode": "rag", "reranker_format": "bge"}, "reranker_format=bge without a reranker; give reranker= as well"),
        ({"mode": "rag", "seed": "x"}, "seed=x: give a whole number of at least 0"),
        ({"mode": "genpoe"}, "genpoe train hypernetwork"),
        ({"mode": "genpoe_rag"}, "genpoe train hypernetwork"),
        ({"mode": "rag", "index": "/no/such/index"}, "index=/no/such/index: no such directory"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(arguments, says):
    with pytest.raises(InputError) as error:
        GenPoEArguments(**arguments)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_modes_ask_only_for_what_they_use():
    assert not GenPoEArguments(mode="closed_book", index="/no/such/index", reranker="x").needs_index
    assert not GenPoEArguments(mode="closed_book", passages="gold", reranker="x").needs_reranker
    assert GenPoEArguments(mode="rag", reranker="x").needs_reranker
    assert not GenPoEArguments(mode="rag", reranker="x", passages="random").needs_reranker


CHANGES: dict[str, tuple[Any, Any]] = {
    "index": (FakeRetriever(), None),
    "reranker": (FakeReranker(), None),
    "num_retrieved": (5, 4),
    "num_passages": (3, 2),
    "gates": ("softmax", "uniform"),
    "gate_temperature": (1.0, 2.0),
    "seed": (0, 1),
}
"""What is given, and what is given instead, for arguments that the choice of passages depends on."""


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("changed", CHANGES)
def test_a_control_uses_what_its_passages_and_gates_depend_on(tokenizer, changed, control):
    """The declaration against the pipeline itself, which does not read it."""
    questions = [Question(f"who is {n}", tuple(f"answer{n + more}" for more in (4, 2, 0))) for n in (0, 10, 20, 30)]
    if changed == "index":
        # Or there would be no passages at all without it.
        for owner in ("A", "B"):
            own = [Passage(f"{owner}{n}", f"T{n}", f"fact {n} of {owner}") for n in range(40)]
            ranked = tuple(RetrievedPassage(passage, 1.0, rank) for rank, passage in enumerate(own, 1))
            questions.append(Question(f"what is {owner}", ("of",), ranked))

    def chosen(**options: Any) -> list[tuple[Any, ...]]:
        given = {name: value for name, (value, _) in CHANGES.items()} | options
        pipeline = Pipeline(
            tokenizer, given.pop("index"), given.pop("reranker"), control=control, progress=False, **given
        )
        selections = pipeline.select(["t"] * len(questions), questions)
        return [(selection.strings, selection.gates) for selection in selections]

    assert (chosen() != chosen(**{changed: CHANGES[changed][1]})) == is_used(changed, "genpoe", control)


EXPECTED: dict[str, dict[str, Any]] = {
    "closed_book": {"mode": "closed_book"},
    "rag": {
        "mode": "rag",
        "index": "fingerprint of index",
        "reranker": None,
        "num_retrieved": 20,
        "num_passages": 4,
        "gates": "softmax",
        "passages": "random",
        "question_field": "question",
        "seed": 3,
    },
}
EXPECTED |= {
    mode: EXPECTED["rag"] | {"mode": mode, "hypernetwork": "fingerprint of hypernetwork"} for mode in EXPERT_MODES
}


@pytest.mark.parametrize("mode", MODES)
def test_the_fingerprint_has_what_the_mode_uses(mode, tmp_path):
    loaded = dict.fromkeys(LOADED) | {"hypernetwork": "fingerprint of hypernetwork", "index": "fingerprint of index"}
    arguments = GenPoEArguments(
        mode=mode, hypernetwork="h", index=str(tmp_path), passages="random", seed=3, trace="t", expert_gb=1.0
    )
    assert arguments.fingerprint(loaded) == EXPECTED[mode]
    formatted = {} if mode == "closed_book" else {"reranker_format": "qwen3"}
    with_format = replace(arguments, reranker="r", reranker_format="qwen3")
    assert with_format.fingerprint(loaded) == EXPECTED[mode] | formatted
    with_more = replace(arguments, expert_layers="11+5", expert_dtype="int8").fingerprint(loaded)
    more = {"expert_layers": (5, 11), "expert_dtype": "int8"} if mode in EXPERT_MODES else {}
    assert with_more == EXPECTED[mode] | more
    # The trace has gates in every mode with passages.
    heated = {} if mode == "closed_book" else {"gate_temperature": 2.0}
    assert replace(arguments, gate_temperature=2).fingerprint(loaded) == EXPECTED[mode] | heated


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("control", CONTROLS)
def test_a_fingerprint_has_all_that_tells_two_runs_apart(mode, control, tmp_path):
    """Or a response cache would answer one run with another's answers."""
    arguments = GenPoEArguments(
        mode=mode,
        hypernetwork="h",
        index=str(tmp_path),
        reranker="r",
        reranker_format="bge",
        passages=control,
        expert_layers=1,
        expert_dtype="int8",
        gate_temperature=0.5,
    )
    decides = deciding(vars(arguments))
    stated = arguments.fingerprint(dict.fromkeys(LOADED, "content"))
    assert decides.keys() - {"passages"} <= stated.keys()
    assert {name for name in ARGUMENTS if is_used(name, mode, control_of(mode, control))} - NON_DECIDING <= {
        *decides,
        "seed",
    }


def test_an_argument_that_is_not_ours_tells_runs_apart_unless_it_says_how():
    for name, value, apart in (("dtype", "float16", True), ("batch_size", 4, False), ("dtype", None, False)):
        assert tells_apart(name, value, "closed_book", "none") == apart
