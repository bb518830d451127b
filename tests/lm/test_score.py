from __future__ import annotations

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from genpoe_plugin.prompts import closed_book_prompt, rag_prompt

TEXT = "Gioachino Rossini was an Italian composer. " * 6


def close(value: float, expected: float) -> bool:
    return abs(value - expected) <= 1e-5 * max(1.0, abs(expected))


@pytest.fixture(scope="module")
def plain(llm, tokenizer) -> HFLM:
    return HFLM(pretrained=llm, tokenizer=tokenizer, device="cpu", batch_size=4)


@pytest.mark.parametrize("mode", ["genpoe", "genpoe_rag"])
@pytest.mark.parametrize("batch_size", [1, 5, "auto"])
def test_scores_equal_one_by_one_by_hand(make_lm, docs, choices, by_hand, expected_row, mode, batch_size, capsys):
    lm = make_lm(mode, batch_size=batch_size, max_batch_size=4)
    requests = choices(docs)
    moved = 0
    for request, (score, _) in zip(requests, lm.loglikelihood(requests), strict=True):
        strings, gates = expected_row(request.doc)
        prompt, start = request.args[0], 0
        if mode == "genpoe_rag" and strings:
            prompt = rag_prompt(request.doc["question"], strings)
            start = len(by_hand.tokenizer(prompt[: prompt.index("Question:")])["input_ids"])
        assert close(score, by_hand.score(prompt, request.args[1], strings, gates, start))
        moved += not close(score, by_hand.score(prompt, request.args[1], (), (), 0))
    assert moved == len([request for request in requests if request.doc["ctxs"]])


@pytest.mark.parametrize(("gates", "field"), [("softmax", "rerank_score"), ("retriever", "score")])
def test_gates_of_either_score_at_a_temperature(make_lm, docs, choices, by_hand, expected_row, gates, field):
    lm = make_lm(gates=gates, gate_temperature=0.4)
    requests = choices(docs)
    moved = 0
    for request, (score, _) in zip(requests, lm.loglikelihood(requests), strict=True):
        strings, cool = expected_row(request.doc)
        scores = [float(ctx[field]) for ctx in request.doc["ctxs"][: len(strings)]]
        weights = (torch.tensor(scores, dtype=torch.float64) / 0.4).softmax(0).tolist()
        assert close(score, by_hand.score(*request.args, strings, weights, 0))
        moved += not close(score, by_hand.score(*request.args, strings, cool, 0))
    assert moved > 9, "the temperature has to matter where there are two passages: 12 requests"


def test_the_limits_of_the_temperature(make_lm, docs, choices):
    """A small one leaves the best passage alone, whatever the others' gates of 0; a large one is uniform."""
    requests = choices(docs)
    for options, same in (
        ({"gate_temperature": 1e-4}, {"num_passages": 1}),
        ({"gate_temperature": 1e12}, {"gates": "uniform"}),
    ):
        found, expected = (make_lm(**each).loglikelihood(requests) for each in (options, same))
        assert all(close(score, other) for (score, _), (other, _) in zip(found, expected, strict=True))


def test_closed_book_and_rag_are_hflm(make_lm, plain, docs, choices, expected_row):
    requests = choices(docs)
    assert make_lm("closed_book").loglikelihood(requests) == plain.loglikelihood(requests)
    prompts = [rag_prompt(request.doc["question"], expected_row(request.doc)[0]) for request in requests]
    same = [
        Instance("loglikelihood", {}, (prompt, request.args[1]), 0, request.metadata)
        for prompt, request in zip(prompts, requests, strict=True)
    ]
    assert make_lm("rag").loglikelihood(requests) == plain.loglikelihood(same)


def test_no_passages_is_hflm(make_lm, plain, docs, choices):
    """HFLM too is asked for every choice on its own: shared logits of several choices are padded otherwise."""
    alone = HFLM(pretrained=plain.model, tokenizer=plain.tokenizer, device="cpu", batch_size=4, logits_cache=False)
    assert make_lm(passages="none").loglikelihood(choices(docs)) == alone.loglikelihood(choices(docs))


def test_equal_contexts_keep_their_own_experts(make_lm, make_doc, by_hand, expected_row):
    """One-token continuations of one context share logits in HFLM."""
    docs = [make_doc("who is it", 0), make_doc("who is it", 1)]
    requests = [
        Instance("loglikelihood", doc, (closed_book_prompt(doc["question"]), " a"), 0, ("t", number, 1))
        for number, doc in enumerate(docs)
    ]
    scores = make_lm().loglikelihood(requests)
    for request, (score, _) in zip(requests, scores, strict=True):
        assert close(score, by_hand.score(*request.args, *expected_row(request.doc), 0))
    assert scores[0] != scores[1]


def test_choices_of_a_doc_share_their_passages(make_lm, plain, docs, tokenizer, expected_row):
    """The longest choice decides for all how many passages there is room for."""
    doc = docs[2]
    strings, _ = expected_row(doc)
    choices = (" a", " Canberra, 1913, or the other country, whose capital was founded by a composer")
    prompt = rag_prompt(doc["question"], strings[:2])
    room = len(tokenizer(prompt + choices[1])["input_ids"]) - 1
    requests = [
        Instance("loglikelihood", doc, (closed_book_prompt(doc["question"]), choice), i, ("mc", 0, 1))
        for i, choice in enumerate(choices)
    ]
    same = [Instance("loglikelihood", {}, (prompt, choice), i, ("mc", 0, 1)) for i, choice in enumerate(choices)]
    assert make_lm("rag", max_length=room).loglikelihood(requests) == plain.loglikelihood(same)


def test_white_space_at_the_end_of_a_context(make_lm, make_doc, by_hand, expected_row):
    doc = make_doc("who is it", 0, 1)
    strings, gates = expected_row(doc)
    context = closed_book_prompt(doc["question"]) + "  "
    ((score, _),) = make_lm("genpoe_rag").loglikelihood(
        [Instance("loglikelihood", doc, (context, "Rossini"), 0, ("t", 0, 1))]
    )
    prompt = rag_prompt(doc["question"], strings)
    start = len(by_hand.tokenizer(prompt[: prompt.index("Question:")])["input_ids"])
    assert close(score, by_hand.score(prompt, "  Rossini", strings, gates, start))


def test_an_empty_context(make_lm, make_doc, by_hand, expected_row):
    doc = make_doc("who is it", 0, 1)
    for mode in ("genpoe", "genpoe_rag"):
        ((score, _),) = make_lm(mode).loglikelihood([Instance("loglikelihood", doc, ("", "Rossini"), 0, ("t", 0, 1))])
        assert close(score, by_hand.score("", "Rossini", *expected_row(doc), 0))


def test_left_truncation_of_a_scored_row(make_lm, make_doc, by_hand, expected_row):
    doc = make_doc("who is it", 0)
    context, continuation = "word " * 40 + closed_book_prompt(doc["question"]), " Rossini"
    lm = make_lm(max_length=24)
    ((score, _),) = lm.loglikelihood([Instance("loglikelihood", doc, (context, continuation), 0, ("t", 0, 1))])
    whole = by_hand.tokenizer(context + continuation)["input_ids"][-25:]
    logprobs = by_hand.logits(whole[:-1], *expected_row(doc), 0).double().log_softmax(-1)
    count = len(by_hand.tokenizer(continuation, add_special_tokens=False)["input_ids"])
    assert close(score, float(sum(logprobs[i - 1, whole[i]] for i in range(25 - count, 25))))


@pytest.mark.parametrize("batch_size", [1, 3, "auto"])
def test_every_window_of_a_rolling_text_has_its_experts(make_lm, docs, by_hand, expected_row, batch_size, capsys):
    lm = make_lm(batch_size=batch_size, max_batch_size=2, max_length=40)
    texts = [TEXT, "short", TEXT + TEXT, "Canberra, 1913"]
    rows = [docs[0], docs[1], docs[3], docs[2]]
    requests = [
        Instance("loglikelihood_rolling", doc, (text,), 0, ("roll", number, 1))
        for number, (doc, text) in enumerate(zip(rows, texts, strict=True))
    ]
    for doc, text, score in zip(rows, texts, lm.loglikelihood_rolling(requests), strict=True):
        ids = by_hand.tokenizer(text)["input_ids"]
        expected, done = 0.0, 0
        while done < len(ids):
            end = min(done + 40, len(ids))
            window = (
                ([by_hand.tokenizer.bos_token_id, *ids])[max(0, end - 40) : end]
                if done
                else ([by_hand.tokenizer.bos_token_id, *ids[: end - 1]])
            )
            logprobs = by_hand.logits(window, *expected_row(doc), 0).double().log_softmax(-1)
            expected += float(sum(logprobs[i - end, ids[i]] for i in range(done, end)))
            done = end
        assert close(score, expected)


def test_rolling_without_experts_is_hflm(make_lm, plain, docs):
    requests = [Instance("loglikelihood_rolling", docs[0], (TEXT,), 0, ("roll", 0, 1))]
    for mode in ("closed_book", "rag"):
        assert make_lm(mode).loglikelihood_rolling(requests) == plain.loglikelihood_rolling(requests)


def test_any_other_task(make_lm, by_hand, tokenizer):
    """A doc without question or passages: its context is the query, and without an index that is said."""
    from genpoe_plugin.errors import InputError

    request = Instance("loglikelihood", {"text": "x"}, ("The sky is", " blue"), 0, ("other", 0, 1))
    with pytest.raises(InputError, match="index=DIRECTORY"):
        make_lm().loglikelihood([request])
    assert make_lm()._question(request).question == "The sky is"
