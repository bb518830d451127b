"""Tasks that know nothing of passages: their contexts are the queries, and every mode answers them."""

from __future__ import annotations

import json
import math

import pytest
from lm_eval.models.huggingface import HFLM

from genpoe_plugin.prompts import knowledge_block

TASKS = ("local_choice", "local_rolling", "local_text")
MODES = ("closed_book", "rag", "genpoe", "genpoe_rag")


def responses(results):
    """What the model gave each sample, by task and doc."""
    return {
        (task, sample["doc_id"]): sample["filtered_resps"]
        for task, samples in results["samples"].items()
        for sample in samples
    }


@pytest.fixture(scope="module")
def given(make_lm, evaluate, index_dir, tmp_path_factory):
    """``given(mode, **options)``: the responses of a run of all tasks with an index, and the lines of its trace."""
    runs = {}

    def run(mode, **options):
        key = (mode, *options.items())
        if key not in runs:
            path = tmp_path_factory.mktemp("trace") / "trace.jsonl"
            lm = make_lm(mode, index=str(index_dir), num_passages=2, trace=str(path), logits_cache=False, **options)
            found = responses(evaluate(lm, *TASKS))
            runs[key] = found, [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return runs[key]

    return run


@pytest.fixture(scope="module")
def plain(llm, tokenizer, evaluate):
    """HFLM's responses. Nobody shares the logits of several choices here, since those are padded otherwise."""
    lm = HFLM(pretrained=llm, tokenizer=tokenizer, device="cpu", batch_size=4, logits_cache=False)
    return responses(evaluate(lm, *TASKS))


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_without_passages_is_hflm(given, plain, mode):
    assert given(mode, passages="none")[0] == plain


@pytest.mark.parametrize("mode", ["rag", "genpoe", "genpoe_rag"])
def test_passages_move_every_score(given, plain, mode):
    """But for running text in mode rag, which is scored as it is."""
    moved = given(mode)[0]
    assert set(moved) == set(plain)
    for (task, doc), response in moved.items():
        if task == "local_rolling" and mode == "rag":
            assert response == plain[task, doc]
        elif task == "local_choice":
            changes = [abs(a[0] - b[0]) for a, b in zip(response[:3], plain[task, doc][:3], strict=True)]
            assert min(changes) > 1e-3
        elif task == "local_rolling":
            assert abs(response[0] - plain[task, doc][0]) > 1e-3
    texts = [(moved[key], plain[key]) for key in moved if key[0] == "local_text"]
    assert any(ours != theirs for ours, theirs in texts)


def test_the_three_kinds_of_passages_differ(given):
    assert given("rag")[0] != given("genpoe")[0] != given("genpoe_rag")[0] != given("rag")[0]


def test_the_context_is_the_query(given):
    lines = given("genpoe")[1]
    questions = {(line["task"], line["doc_id"]): line["question"] for line in lines if line["question"]}
    assert questions["local_choice", 1] == "Q: who found radium A:"
    assert questions["local_text", 2] == "capital of the country ->"
    assert questions["local_rolling", 0] == "Gioachino Rossini was a composer."
    assert all(len(line["passages"]) == 2 for line in lines)


def test_a_choice_is_scored_with_the_experts_of_its_passages(given, by_hand, fact_strings):
    responses, lines = given("genpoe")
    line = next(line for line in lines if (line["task"], line["doc_id"]) == ("local_choice", 0) and line["question"])
    strings = [fact_strings[entry["id"]] for entry in line["passages"]]
    gates = [entry["gate"] for entry in line["passages"]]
    for choice, (score, _) in zip((" Rossini", " Curie", " Canberra"), responses["local_choice", 0][:3], strict=True):
        expected = by_hand.score("Q: who composed the barber of Seville\nA:", choice, strings, gates, 0)
        assert math.isclose(score, expected, rel_tol=1e-5)


def test_knowledge_goes_before_the_context(given, by_hand, fact_strings):
    responses, lines = given("rag")
    line = next(line for line in lines if (line["task"], line["doc_id"]) == ("local_choice", 0) and line["question"])
    prompt = knowledge_block([fact_strings[entry["id"]] for entry in line["passages"]])
    prompt += "Q: who composed the barber of Seville\nA:"
    for choice, (score, _) in zip((" Rossini", " Curie", " Canberra"), responses["local_choice", 0][:3], strict=True):
        assert math.isclose(score, by_hand.score(prompt, choice, (), (), 0), rel_tol=1e-5)
