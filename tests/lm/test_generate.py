from __future__ import annotations

import copy

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from genpoe_plugin.lm.hf import GenPoELM
from genpoe_plugin.prompts import closed_book_prompt, rag_prompt


@pytest.fixture(scope="module")
def plain(llm, tokenizer) -> HFLM:
    return HFLM(pretrained=llm, tokenizer=tokenizer, device="cpu", batch_size=4)


def with_prompts(requests: list[Instance], prompts: list[str]) -> list[Instance]:
    return [
        Instance(request.request_type, {}, (prompt, *request.args[1:]), 0, request.metadata)
        for request, prompt in zip(requests, prompts, strict=True)
    ]


def rag_prompts(docs, expected_row) -> list[str]:
    return [rag_prompt(doc["question"], expected_row(doc)[0]) for doc in docs]


def test_closed_book_is_hflm(make_lm, plain, docs, generation):
    assert make_lm("closed_book").generate_until(generation(docs)) == plain.generate_until(generation(docs))


def test_rag_is_hflm_on_the_same_prompts(make_lm, plain, docs, generation, expected_row):
    requests = generation(docs)
    expected = plain.generate_until(with_prompts(requests, rag_prompts(docs, expected_row)))
    assert make_lm("rag").generate_until(requests) == expected
    assert expected != plain.generate_until(requests)


@pytest.mark.parametrize("mode", ["genpoe", "genpoe_rag"])
@pytest.mark.parametrize("batch_size", [1, 3, 6, "auto"])
def test_every_row_of_a_batch_has_its_own_experts(
    make_lm, docs, generation, by_hand, expected_row, mode, batch_size, capsys
):
    """Research code: a batch's first passage serves every row, and fewer passages than experts crash."""
    answers = make_lm(mode, batch_size=batch_size, max_batch_size=4, max_length=512).generate_until(generation(docs))
    closed = 0
    for doc, answer in zip(docs, answers, strict=True):
        strings, gates = expected_row(doc)
        prompt, start = closed_book_prompt(doc["question"]), 0
        if mode == "genpoe_rag" and strings:
            prompt = rag_prompt(doc["question"], strings)
            start = len(by_hand.tokenizer(prompt[: prompt.index("Question:")])["input_ids"])
        expected, gap = by_hand.generate(prompt, strings, gates, start)
        if gap > 1e-4:
            assert answer == expected
        closed += answer == by_hand.generate(prompt, (), (), 0)[0]
    assert closed < len(docs) / 2, "experts have to matter for this test to mean anything"


def test_order_does_not_matter(make_lm, docs, generation):
    lm = make_lm("genpoe_rag", batch_size=4)
    answers = lm.generate_until(generation(docs))
    assert lm.generate_until(generation(docs[::-1])) == answers[::-1]
    for doc, answer in zip(docs, answers, strict=True):
        if doc["ctxs"]:
            assert lm.generate_until(generation([doc])) == [answer]


def test_equal_prompts_with_other_passages_in_one_batch(make_lm, make_doc, generation):
    docs = [make_doc("who is it", 0), make_doc("who is it", 1), make_doc("who is it")]
    answers = make_lm().generate_until(generation(docs))
    assert answers == make_lm(batch_size=1).generate_until(generation(docs))
    assert len(set(answers)) == 3


def test_no_passages_is_the_original_model_bit_for_bit(make_lm, plain, docs, generation):
    """Through the same hooks: the logits of every step are compared, not only the answers."""
    logits: dict[str, list[torch.Tensor]] = {}

    def run(name, lm):
        steps = logits.setdefault(name, [])
        handle = lm.model.lm_head.register_forward_hook(lambda module, args, output: steps.append(output.clone()))
        try:
            return lm.generate_until(generation(docs))
        finally:
            handle.remove()

    assert run("genpoe", make_lm(passages="none")) == run("plain", plain)
    assert len(logits["genpoe"]) == len(logits["plain"]) > 0
    assert all(torch.equal(a, b) for a, b in zip(logits["genpoe"], logits["plain"], strict=True))


def test_the_final_evaluation_is_not_the_base_model(make_lm, plain, docs, generation):
    """Research code: its injection is commented out, so it reports the base LLM."""
    answers = make_lm().generate_until(generation(docs))
    base = plain.generate_until(generation(docs))
    differ = [answer != other for answer, other in zip(answers, base, strict=True)]
    assert differ[3] is False, "this doc has no passages"
    assert sum(differ) >= 4


def test_answers_are_whole(make_lm, docs, generation, by_hand, expected_row):
    """Research code: 10 tokens at most, and cut by the number of characters in the prompt."""
    doc = docs[0]
    strings, gates = expected_row(doc)
    expected, gap = by_hand.generate(closed_book_prompt(doc["question"]), strings, gates, 0, tokens=30)
    (answer,) = make_lm().generate_until(generation([doc], max_gen_toks=30, until=["\n"]))
    assert gap > 1e-4
    assert answer == expected
    assert len(by_hand.tokenizer(answer, add_special_tokens=False)["input_ids"]) > 10


def test_beams(make_lm, docs, generation):
    lm, alone = make_lm(batch_size=6), make_lm(batch_size=1)
    beams = lm.generate_until(generation(docs, num_beams=3))
    assert beams == alone.generate_until(generation(docs, num_beams=3))
    assert beams != lm.generate_until(generation(docs))


def test_gen_kwargs_and_contexts_stay_as_they_were(make_lm, docs, generation):
    requests = generation(docs)
    before = copy.deepcopy([(request.doc, request.arguments) for request in requests])
    make_lm("genpoe_rag").generate_until(requests)
    assert [(request.doc, request.arguments) for request in requests] == before
    assert all(type(request.args[0]) is str for request in requests)


def test_few_shot_and_chat(make_lm, make_doc, by_hand, expected_row):
    """Knowledge stands before the task's own question, and experts begin there."""
    doc = make_doc("who wrote the opera", 0, 4)
    strings, gates = expected_row(doc)
    knowledge = "Knowledge:\n" + "".join(f"{string}\n" for string in strings)
    for before, question, after in (
        ("Question: Where?\nAnswer: Here\n\n", "Question: Who wrote the opera?", "\nAnswer:"),
        ("<|user|>\n", "Q: who wrote the opera", "\n<|assistant|>\n\n"),
    ):
        request = Instance(
            "generate_until", doc, (before + question + after, {"until": ["\n\n"], "max_gen_toks": 6}), 0, ("t", 0, 1)
        )
        (answer,) = make_lm("genpoe_rag").generate_until([request])
        start = len(by_hand.tokenizer(before + knowledge)["input_ids"])
        expected, gap = by_hand.generate(before + knowledge + question + after, strings, gates, start, tokens=6)
        assert gap > 1e-4
        assert answer.split("\n")[0] == expected


def test_a_bos_in_the_template_is_not_doubled(make_lm, make_doc, by_hand, expected_row):
    doc = make_doc("who wrote the opera", 0)
    strings, gates = expected_row(doc)
    context = "<s>" + closed_book_prompt(doc["question"])
    request = Instance("generate_until", doc, (context, {"until": ["\n"], "max_gen_toks": 6}), 0, ("t", 0, 1))
    prompt = rag_prompt(doc["question"], strings)
    start = len(by_hand.tokenizer(prompt[: prompt.index("Question:")])["input_ids"])
    expected, gap = by_hand.generate(prompt, strings, gates, start, tokens=6)
    assert gap > 1e-4
    assert make_lm("genpoe_rag").generate_until([request]) == [expected]


def test_whole_passages_are_dropped_from_a_long_prompt(make_lm, plain, docs, generation, expected_row, tokenizer):
    doc = docs[2]
    strings, _ = expected_row(doc)
    fitting = rag_prompt(doc["question"], strings[:2])
    room = len(tokenizer(fitting)["input_ids"]) + 8
    answers = make_lm("rag", max_length=room + 3).generate_until(generation([doc]))
    assert answers == plain.generate_until(with_prompts(generation([doc]), [fitting]))


def test_left_truncation_moves_the_start(make_lm, make_doc, by_hand):
    """A prompt that fits with no passage but one, cut by lm-eval itself, still starts its experts at the question."""
    doc = make_doc("who wrote the opera", 0)
    lm = make_lm("genpoe_rag", max_length=30)
    placed = lm._place(closed_book_prompt(doc["question"]), _selection(lm, doc), lambda _: True)
    ids, _ = lm.tok_batch_encode((placed,), left_truncate_len=20)
    question = by_hand.tokenizer(closed_book_prompt(doc["question"]), add_special_tokens=False)["input_ids"]
    assert ids.shape == (1, 20)
    assert int(lm._batch.rows.start) == 20 - len(question) > 0
    lm.tok_batch_encode((placed,), left_truncate_len=len(question) - 2)
    assert int(lm._batch.rows.start) == 0


def _selection(lm: GenPoELM, doc):
    request = Instance("generate_until", doc, (closed_book_prompt(doc["question"]), {}), 0, ("t", 0, 1))
    return lm.pipeline.select(["t"], [lm._question(request)])[0]


def test_auto_probes_with_the_most_experts(make_lm, docs, generation, monkeypatch, capsys):
    lm = make_lm(batch_size="auto", max_batch_size=4, max_length=256)
    seen = []
    rows = lm.store.rows
    monkeypatch.setattr(lm.store, "rows", lambda *args: seen.append((lm._batch._probing, rows(*args))) or seen[-1][1])
    lm.generate_until(generation(docs))
    probes = [experts for probing, experts in seen if probing]
    assert probes and all(experts.gates.shape == (4, 4) and (experts.gates > 0).all() for experts in probes)


def test_half_precision(make_lm, make_llm, docs, generation):
    """Research code crashes in half precision."""
    llm = make_llm("llama").to(torch.bfloat16)
    assert len(make_lm(pretrained=llm).generate_until(generation(docs))) == len(docs)


def test_a_directory_as_users_give_it(llm_dir, hypernetwork_dir, docs, generation, make_lm):
    lm = GenPoELM.create_from_arg_string(
        f"pretrained={llm_dir},mode=genpoe,hypernetwork={hypernetwork_dir},dtype=float32",
        {"batch_size": 2, "max_batch_size": 64, "device": "cpu"},
    )
    assert lm.generate_until(generation(docs)) == make_lm().generate_until(generation(docs))
    info = lm.get_model_info()["genpoe"]
    assert info["questions"] == len(docs)
    assert info["questions_per_second"] == pytest.approx(
        len(docs) / (info["seconds"]["experts"] + info["seconds"]["generate"]), rel=0.1
    )
    assert set(info["seconds"]) == {"retrieve", "rerank", "experts", "generate"}
    assert info["arguments"]["mode"] == "genpoe"
    assert info["fingerprint"]["hypernetwork"]


@pytest.mark.parametrize("mode", ["genpoe", "rag"])
def test_bytes_of_experts_and_the_time_to_the_first_token_are_reported(make_lm, docs, generation, expected_row, mode):
    lm = make_lm(mode)
    assert lm.get_model_info()["genpoe"]["first_token_seconds"] is None
    lm.generate_until(generation(docs))
    info = lm.get_model_info()["genpoe"]
    assert 0 < info["first_token_seconds"] < info["seconds"]["generate"]
    if mode == "rag":
        assert info["expert_bytes"] is None
    else:
        held = [lm.store.experts([expected_row(doc)[0]])[0].weights for doc in docs if doc["ctxs"]]
        numbers = sum(weight.numel() for weights in held for weight in weights)
        assert info["expert_bytes"] == 4 * numbers > 0


def test_nothing_to_do(make_lm):
    assert make_lm().generate_until([]) == []
    assert make_lm().loglikelihood([]) == []
