"""``python -m benchmarks real-llm vllm`` on a tiny LLM."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from benchmarks.__main__ import main
from benchmarks.real_llm import engine
from genpoe_plugin.data.passages import Passage
from genpoe_plugin.data.questions import Question, RetrievedPassage, write_questions
from tests.lm.vllm.test_engine import FACTS


@pytest.fixture
def questions():
    return [
        Question(
            f"Who wrote opera {number}?",
            ("Rossini",),
            tuple(
                RetrievedPassage(Passage(f"{number}.{rank}", "", FACTS[(number + rank) % len(FACTS)]), 1.0, rank)
                for rank in range(1, 5)
            ),
        )
        for number in range(3)
    ]


def test_answers_and_likelihoods_are_the_same(llm_dir, hypernetwork_dir, questions, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "TIMED", 2)
    write_questions(tmp_path / "questions.jsonl", questions)
    words = ["real-llm", "vllm", "--llm", llm_dir, "--hypernetwork", hypernetwork_dir, "--out", tmp_path / "out"]
    words += ["--questions", tmp_path / "questions.jsonl", "--requests", 8, "--json", tmp_path / "rows.json"]
    result = CliRunner().invoke(main, list(map(str, words)))
    assert result.exit_code == 0, result.output
    rows = {row["name"]: row["value"] for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    assert rows["real_vllm.requests"] == 8
    assert rows["real_vllm.different_beyond_margin"] == 0 and rows["real_vllm.likelihoods_apart"] < 1e-4
    assert rows["real_vllm.em_transformers"] == rows["real_vllm.em_vllm"]
    assert rows["real_vllm.experts_made"] > 0
    assert rows["real_vllm.first_token_genpoe_cold"] > 0 and rows["real_vllm.first_token_rag_warm"] > 0


def test_margins_are_those_where_an_answer_begins_to_differ(make_vllm, questions):
    from vllm import SamplingParams

    lm = make_vllm(gates="uniform")
    made = engine.requests(questions, 3, engine.NUMBERS)
    answers = lm.generate_until(made)
    assert engine._margins(lm, made, answers, answers) == []
    assert engine._margins(lm, made, answers, [f"{text}\ufffd" for text in answers]) == [], "an unfinished character"
    passages = [one.passage.string for one in questions[0].passages]
    sampling = SamplingParams(temperature=0, max_tokens=4, logprobs=2)
    (output,) = lm._engine.generate([lm._engine.request(made[0].args[0], passages, sampling)], progress=False)
    steps = [
        max(entry.logprob for entry in step.values()) - min(entry.logprob for entry in step.values())
        for step in output.outputs[0].logprobs
    ]
    for kept in (0, 2):
        begin = lm.tokenizer.decode(output.outputs[0].token_ids[:kept])
        (margin,) = engine._margins(lm, made, answers, [f"{begin}\0 other", *answers[1:]])
        assert margin == pytest.approx(steps[kept], abs=1e-3)
