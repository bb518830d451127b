"""The other forms of a hypernetwork through the model class, against the arithmetic by hand."""

from __future__ import annotations

import pytest

from genpoe_plugin.prompts import closed_book_prompt, rag_prompt

FORMS = [
    {"head": "factored"},
    {"states": "contextual"},
    {"head": "factored", "states": "contextual", "encoder": "mean"},
    {"head": "memory", "states": "contextual"},
]


@pytest.fixture(params=FORMS, ids=lambda form: "-".join(form.values()))
def directory(make_hypernetwork_dir, request):
    return make_hypernetwork_dir(**request.param)


@pytest.mark.parametrize("mode", ["genpoe", "genpoe_rag"])
def test_scores_and_answers_equal_those_by_hand(
    make_lm, make_by_hand, directory, docs, choices, generation, expected_row, mode
):
    lm, by_hand = make_lm(mode, hypernetwork=str(directory)), make_by_hand(directory)
    requests, changed = choices(docs), 0
    for request, (score, _) in zip(requests, lm.loglikelihood(requests), strict=True):
        prompt, row = placed(by_hand, request.doc, expected_row, mode)
        expected = by_hand.score(prompt, request.args[1], *row)
        assert score == pytest.approx(expected, rel=1e-5, abs=1e-5)
        changed += score != pytest.approx(by_hand.score(prompt, request.args[1], (), (), 0), rel=1e-3)
    assert changed == len([request for request in requests if request.doc["ctxs"]])
    for doc, answer in zip(docs, lm.generate_until(generation(docs)), strict=True):
        prompt, row = placed(by_hand, doc, expected_row, mode)
        expected, gap = by_hand.generate(prompt, *row)
        assert answer == expected or gap <= 1e-4


def placed(by_hand, doc, expected_row, mode):
    """The prompt of a doc; the passages, gates and start of its experts."""
    strings, gates = expected_row(doc)
    prompt, start = closed_book_prompt(doc["question"]), 0
    if mode == "genpoe_rag" and strings:
        prompt = rag_prompt(doc["question"], strings)
        start = len(by_hand.tokenizer(prompt[: prompt.index("Question:")])["input_ids"])
    return prompt, (strings, gates, start)


@pytest.mark.parametrize("mode", ["genpoe", "genpoe_rag"])
@pytest.mark.parametrize("head", ["factored", "memory"])
def test_an_untrained_silent_hypernetwork_changes_nothing(
    make_lm, make_hypernetwork_dir, docs, choices, generation, mode, head
):
    """Bit for bit, the prompts being the same."""
    untrained = make_lm(mode, hypernetwork=str(make_hypernetwork_dir(head=head, base="silent")))
    plain = make_lm("rag" if mode == "genpoe_rag" else "closed_book", logits_cache=False)
    assert untrained.generate_until(generation(docs)) == plain.generate_until(generation(docs))
    assert untrained.loglikelihood(choices(docs)) == plain.loglikelihood(choices(docs))
