"""``real-llm vllm``: its requests, and what it refuses. With vLLM, tests/lm/vllm has the answers."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
from click.testing import CliRunner

from benchmarks.__main__ import main
from benchmarks.real_llm.engine import NUMBERS, requests, scored
from genpoe_plugin.data.passages import Passage
from genpoe_plugin.data.questions import Question, RetrievedPassage


@pytest.fixture
def questions():
    return [
        Question(
            f"q{number}?",
            (f"a{number}",),
            tuple(RetrievedPassage(Passage(f"{number}-{rank}", "", f"t{rank}"), 1.0, rank) for rank in range(1, 6)),
        )
        for number in range(8)
    ]


def test_requests_have_every_number_of_passages_and_questions_come_again_with_another(questions):
    made = requests(questions, 16, NUMBERS)
    counts = [len(one.doc["ctxs"]) for one in made]
    assert counts[:8] == [*NUMBERS, *NUMBERS] and sorted(counts) == sorted(NUMBERS * 4)
    for first, again in zip(made[:8], made[8:], strict=True):
        assert first.doc["question"] == again.doc["question"] and first.args[0] == again.args[0]
        assert len(first.doc["ctxs"]) != len(again.doc["ctxs"])
    texts = [ctx["text"] for ctx in made[0].doc["ctxs"]]
    assert texts == ["t1", "t2", "t3", "t4"]


def test_scored_requests_are_the_same_with_the_first_answer(questions):
    made = requests(questions, 4, NUMBERS)
    for one, other in zip(made, scored(made), strict=True):
        assert other.request_type == "loglikelihood" and other.doc == one.doc
        assert other.args == (one.args[0], f" {one.doc['answers'][0]}")


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_it_says_what_to_install(tmp_path):
    words = ["--llm", "x", "--hypernetwork", "y", "--questions", "q.jsonl", "--out", tmp_path]
    result = CliRunner().invoke(main, ["real-llm", "vllm", *map(str, words)])
    assert result.exit_code == 2 and "pip install 'lm-eval-genpoe[vllm]'" in result.output
