"""Experts in the LLM's attention under lm-eval, against the LLM with passages in its input and masks of our own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance

from genpoe_plugin.checkpoints.checkpoint import checkpoint_fingerprint, save_hypernetwork
from genpoe_plugin.errors import InputError
from genpoe_plugin.experts.generator import ExpertGenerator
from genpoe_plugin.experts.hypernetwork import Hypernetwork
from genpoe_plugin.llm.language_model import weights_sample
from genpoe_plugin.prompts import closed_book_prompt, rag_prompt
from genpoe_plugin.training.creation import attention_config, create_attention_experts

EVERY, SOME = (0, 1, 2), (0, 2)


@pytest.fixture(scope="module")
def make_checkpoint(tmp_path_factory, llm, tokenizer):
    """``make(layers)``: an untrained checkpoint with experts in them."""
    made: dict[tuple[int, ...], Path] = {}

    def make(layers: tuple[int, ...] = EVERY) -> Path:
        if layers not in made:
            made[layers] = tmp_path_factory.mktemp("checkpoint") / "attention"
            create_attention_experts(made[layers], attention_config(llm, layers), llm, tokenizer)
        return made[layers]

    return make


@pytest.fixture(scope="module")
def make_attention_lm(make_lm, make_checkpoint, bare_tokenizer):
    """The model class with such a checkpoint; the tokenizer puts nothing before a text."""

    def make(mode: str = "genpoe", layers: tuple[int, ...] = EVERY, **options):
        if mode.startswith("genpoe"):
            options.setdefault("hypernetwork", str(make_checkpoint(layers)))
        return make_lm(mode, **{"tokenizer": bare_tokenizer, **options})

    return make


class ByHand:
    """The LLM over all passages and the prompt in one input: who sees whom is a mask, who stands where a position."""

    def __init__(self, llm, tokenizer, layers: Sequence[int] = EVERY) -> None:
        self.llm, self.tokenizer, self.layers = llm, tokenizer, layers

    @torch.no_grad()
    def logits(self, ids: list[int], passages: Sequence[str], gates: Sequence[float], start: int) -> torch.Tensor:
        texts = [
            self.tokenizer(f"Knowledge:\n{passage}\n", return_special_tokens_mask=True, return_offsets_mapping=True)
            for passage in passages
        ]
        lengths = [len(text["input_ids"]) for text in texts]
        own, whole = sum(lengths), sum(lengths) + len(ids)
        plain = torch.full((whole, whole), -1e9)
        plain[own:, own:] = torch.full((len(ids), len(ids)), -1e9).triu(1)
        mixed, first, positions = plain.clone(), 0, []
        for text, length, gate in zip(texts, lengths, gates, strict=True):
            block = slice(first, first + length)
            for mask in (plain, mixed):
                mask[block, block] = torch.full((length, length), -1e9).triu(1)
            seen = torch.tensor(text["special_tokens_mask"]) == 0
            mixed[own + start :, block] = torch.where(seen, torch.tensor(gate / max(gates)).log(), -1e9)
            positions += range(-length, 0)
            first += length
        handles = []
        for layer, block_of in enumerate(self.llm.model.layers):
            mask = (mixed if layer in self.layers else plain)[None, None]

            def masked(module, args, kwargs, mask=mask):
                return args, {**kwargs, "attention_mask": mask}

            handles.append(block_of.self_attn.register_forward_pre_hook(masked, with_kwargs=True))
        everything = [token for text in texts for token in text["input_ids"]] + ids
        try:
            places = torch.tensor([positions + list(range(len(ids)))])
            return self.llm(torch.tensor([everything]), position_ids=places).logits[0, own:]
        finally:
            for handle in handles:
                handle.remove()

    def generate(self, prompt: str, passages, gates, start: int = 0, tokens: int = 8) -> tuple[str, float]:
        """The greedy answer's first line, and the smallest gap between the two best logits on the way."""
        ids, new, gap = self.tokenizer(prompt)["input_ids"], [], float("inf")
        while len(new) < tokens and self.tokenizer.eos_token_id not in new:
            logits = self.logits(ids + new, passages, gates, start)[-1]
            best = logits.topk(2).values
            gap = min(gap, float(best[0] - best[1]))
            new.append(int(logits.argmax()))
        return self.tokenizer.decode(new, skip_special_tokens=True).split("\n")[0], gap

    def score(self, prompt: str, continuation: str, passages, gates, start: int = 0) -> float:
        context = self.tokenizer(prompt)["input_ids"]
        whole = self.tokenizer(prompt + continuation)["input_ids"]
        logprobs = self.logits(whole[:-1], passages, gates, start).double().log_softmax(-1)
        return float(sum(logprobs[i - 1, whole[i]] for i in range(len(context), len(whole))))


@pytest.fixture(scope="module")
def by_mask(llm, bare_tokenizer):
    return lambda layers=EVERY, tokenizer=bare_tokenizer: ByHand(llm, tokenizer, layers)


@pytest.fixture(scope="module")
def single(make_doc):
    """Docs with one passage each, and one without."""
    questions = ("who wrote the opera about a barber", "who won two prizes", "where is the capital", "who jumps")
    return [make_doc(question, number) for number, question in enumerate(questions)] + [make_doc("who is it")]


def as_asked(mode, doc, expected_row, tokenizer):
    """The prompt of a mode, its experts, and where they begin."""
    strings, gates = expected_row(doc)
    if mode == "genpoe" or not strings:
        return closed_book_prompt(doc["question"]), strings, gates, 0
    prompt = rag_prompt(doc["question"], strings)
    return prompt, strings, gates, len(tokenizer(prompt[: prompt.index("Question:")])["input_ids"])


def close(found: float, expected: float) -> bool:
    return abs(found - expected) <= 1e-4 * max(1.0, abs(expected))


def test_one_passage_in_all_layers_is_the_passage_in_the_prompt(make_attention_lm, single, generation, choices):
    genpoe, rag, closed = (make_attention_lm(mode) for mode in ("genpoe", "rag", "closed_book"))
    answers = genpoe.generate_until(generation(single, max_gen_toks=16, until=["\n\n"]))
    assert answers == rag.generate_until(generation(single, max_gen_toks=16, until=["\n\n"]))
    without = closed.generate_until(generation(single, max_gen_toks=16, until=["\n\n"]))
    assert [answer == other for answer, other in zip(answers, without, strict=True)] == [False] * 4 + [True]
    scores = zip(*(lm.loglikelihood(choices(single)) for lm in (genpoe, rag, closed)), choices(single), strict=True)
    for (score, greedy), (expected, expected_greedy), (other, _), request in scores:
        assert close(score, expected) and greedy == expected_greedy
        assert close(score, other) != bool(request.doc["ctxs"])


def test_experts_in_some_layers_are_something_else(make_attention_lm, single, generation):
    requests = generation(single[:4], max_gen_toks=16, until=["\n\n"])
    assert make_attention_lm(layers=SOME).generate_until(requests) != make_attention_lm("rag").generate_until(requests)


@pytest.mark.parametrize("mode", ["genpoe", "genpoe_rag"])
@pytest.mark.parametrize(("layers", "batch_size"), [(EVERY, 1), (EVERY, 4), (SOME, 4), (SOME, "auto")])
def test_every_row_of_a_batch_has_its_own_experts(
    make_attention_lm, docs, generation, choices, by_mask, expected_row, mode, layers, batch_size, capsys
):
    """No passage, one, or four; in a batch and alone; seen beside the prompt's own, or instead of them."""
    lm = make_attention_lm(mode, layers, batch_size=batch_size, max_batch_size=4, max_length=256)
    hand, closed = by_mask(layers), 0
    for doc, answer in zip(docs, lm.generate_until(generation(docs)), strict=True):
        prompt, strings, gates, start = as_asked(mode, doc, expected_row, hand.tokenizer)
        expected, gap = hand.generate(prompt, strings, gates, start)
        if gap > 1e-3:
            assert answer == expected
        closed += answer == hand.generate(prompt, (), (), 0)[0]
    assert closed < len(docs) / 2, "experts have to matter for this test to mean anything"
    moved = 0
    for request, (score, _) in zip(choices(docs), lm.loglikelihood(choices(docs)), strict=True):
        asked = as_asked(mode, request.doc, expected_row, hand.tokenizer)
        assert close(score, hand.score(asked[0], request.args[1], *asked[1:]))
        moved += not close(score, hand.score(asked[0], request.args[1], (), (), 0))
    assert moved == len([request for request in choices(docs) if request.doc["ctxs"]])


@pytest.mark.parametrize("mode", ["genpoe", "genpoe_rag"])
def test_with_a_bos_before_every_text(make_attention_lm, docs, choices, by_mask, expected_row, tokenizer, mode):
    """The passage is read with it, and no expert has it."""
    lm, hand = make_attention_lm(mode, SOME, tokenizer=tokenizer), by_mask(SOME, tokenizer)
    for request, (score, _) in zip(choices(docs), lm.loglikelihood(choices(docs)), strict=True):
        asked = as_asked(mode, request.doc, expected_row, tokenizer)
        assert close(score, hand.score(asked[0], request.args[1], *asked[1:]))


def test_batches_are_their_rows_one_by_one(make_attention_lm, docs, generation):
    # With beams, lm-eval looks for the end in as many of them as there are rows, so here there is none to be found.
    for options in ({}, {"num_beams": 3, "until": ["@@@@"]}):
        requests = generation(docs, **options)
        answers = make_attention_lm(batch_size=6).generate_until(requests)
        assert answers == make_attention_lm(batch_size=1).generate_until(requests)
        alone = make_attention_lm(batch_size=1)
        with_passages = [n for n, doc in enumerate(docs) if doc["ctxs"]]
        assert [answers[n] for n in with_passages] == [alone.generate_until([requests[n]])[0] for n in with_passages]


def test_no_passages_is_closed_book_bit_for_bit(make_attention_lm, docs, generation, choices):
    none, closed = make_attention_lm(passages="none"), make_attention_lm("closed_book", logits_cache=False)
    logits = {}
    for name, lm in (("none", none), ("closed", closed)):
        steps = logits[name] = []
        handle = lm.model.lm_head.register_forward_hook(
            lambda _m, _a, output, steps=steps: steps.append(output.clone())
        )
        try:
            logits[name, "answers"] = lm.generate_until(generation(docs)), lm.loglikelihood(choices(docs))
        finally:
            handle.remove()
    assert logits["none", "answers"] == logits["closed", "answers"]
    assert len(logits["none"]) == len(logits["closed"]) > 0
    assert all(torch.equal(a, b) for a, b in zip(logits["none"], logits["closed"], strict=True))


def test_the_limits_of_the_temperature(make_attention_lm, docs, choices):
    """A small one leaves the best passage alone, whatever the others' gates of 0; a large one is uniform."""
    requests = choices(docs)
    for options, same in (
        ({"gate_temperature": 1e-4}, {"num_passages": 1}),
        ({"gate_temperature": 1e12}, {"gates": "uniform"}),
    ):
        found, expected = (make_attention_lm(**each).loglikelihood(requests) for each in (options, same))
        assert all(close(score, other) for (score, _), (other, _) in zip(found, expected, strict=True))


@pytest.mark.parametrize("control", ["gold", "shuffled", "constant"])
def test_controls_are_answered_with_the_passages_of_the_trace(
    make_attention_lm, docs, choices, by_mask, fact_strings, tmp_path, control
):
    path = tmp_path / "trace.jsonl"
    lm, hand = make_attention_lm(passages=control, trace=str(path)), by_mask()
    scores = lm.loglikelihood(choices(docs))
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    fingerprint = checkpoint_fingerprint(lm.arguments.hypernetwork)
    others = 0
    for request, (score, _) in zip(choices(docs), scores, strict=True):
        (line,) = [line for line in lines if line["doc_id"] == request.doc_id]
        assert line["hypernetwork"] == lm.fingerprint["hypernetwork"] == fingerprint and line["control"] == control
        strings = [fact_strings[entry["id"]] for entry in line["passages"]]
        gates = [entry["gate"] for entry in line["passages"]]
        assert close(score, hand.score(*request.args, strings, gates))
        others += [ctx["id"] for ctx in request.doc["ctxs"][:4]] != [entry["id"] for entry in line["passages"]]
    assert others


def test_a_later_run_takes_experts_from_the_folder(make_attention_lm, docs, generation, tmp_path, monkeypatch):
    """Those of the same layers only: units of others are of another width, or of another place."""
    write, made = ExpertGenerator.write, []
    monkeypatch.setattr(
        ExpertGenerator, "write", lambda self, passages, *rest: made.extend(passages) or write(self, passages, *rest)
    )
    folder, expected = str(tmp_path / "store"), {}
    for layers in (EVERY, SOME, (1, 2)):
        expected[layers] = make_attention_lm(layers=layers).generate_until(generation(docs))
        made.clear()
        assert (
            make_attention_lm(layers=layers, expert_store=folder).generate_until(generation(docs)) == expected[layers]
        )
        assert len(made) == 5, "nobody else's are taken"
    assert len({path.name for path in Path(folder).iterdir()}) == 3
    made.clear()
    for layers in (EVERY, SOME, (1, 2)):
        for options in ({}, {"expert_gb": 1e-9}):
            lm = make_attention_lm(layers=layers, expert_store=folder, **options)
            assert lm.generate_until(generation(docs)) == expected[layers]
    assert not made


def test_a_trained_bias_is_another_checkpoint(make_attention_lm, docs, choices, llm, tokenizer, tmp_path):
    network = Hypernetwork(attention_config(llm))
    network.head.bias.data.fill_(-40.0)
    save_hypernetwork(tmp_path / "quiet", network, llm, tokenizer, {})
    lm, plain = make_attention_lm(hypernetwork=str(tmp_path / "quiet")), make_attention_lm()
    assert lm.fingerprint["hypernetwork"] != plain.fingerprint["hypernetwork"]
    closed = make_attention_lm("closed_book").loglikelihood(choices(docs))
    found = lm.loglikelihood(choices(docs))
    assert all(close(score, expected) for (score, _), (expected, _) in zip(found, closed, strict=True))
    assert found != plain.loglikelihood(choices(docs))


CONTEXTS = {
    "few-shot": ("Question: Where?\nAnswer: Here\n\n", "Question: Who wrote the opera?", "\nAnswer:"),
    "chat": ("<|user|>\n", "Q: who wrote the opera", "\n<|assistant|>"),
}


@pytest.mark.parametrize("context", CONTEXTS)
def test_few_shot_and_chat(make_attention_lm, make_doc, by_mask, expected_row, context):
    before, question, after = CONTEXTS[context]
    prompt, choice = before + question + after, " Rossini"
    one, doc = make_doc("who wrote the opera", 0), make_doc("who wrote the opera", 0, 4, 1)

    def ask(mode, context, doc, **options):
        request = Instance("loglikelihood", doc, (context, choice), 0, ("t", 0, 1))
        return make_attention_lm(mode, **options).loglikelihood([request])[0][0]

    # One passage in all layers stands before everything.
    block = "Knowledge:\n" + "".join(f"{string}\n" for string in expected_row(one)[0])
    assert close(ask("genpoe", prompt, one), ask("closed_book", block + prompt, one))
    # Beside passages in the prompt, experts are seen from the question on.
    strings, gates = expected_row(doc)
    knowledge = "Knowledge:\n" + "".join(f"{string}\n" for string in strings)
    hand = by_mask(SOME)
    start = len(hand.tokenizer(before + knowledge)["input_ids"])
    expected = hand.score(before + knowledge + question + after, choice, strings, gates, start)
    assert close(ask("genpoe_rag", prompt, doc, layers=SOME), expected)
    seen_by_all = hand.score(before + knowledge + question + after, choice, strings, gates, 0)
    assert not close(expected, seen_by_all)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_window_of_a_rolling_text_has_its_experts(
    make_attention_lm, docs, by_mask, expected_row, tokenizer, batch_size
):
    hand = by_mask(EVERY, tokenizer)
    lm = make_attention_lm(tokenizer=tokenizer, batch_size=batch_size, max_length=40)
    text = "Gioachino Rossini was an Italian composer. " * 6
    texts = [text, "short", text + text, "Canberra, 1913"]
    rows = [docs[0], docs[1], docs[3], docs[2]]
    requests = [
        Instance("loglikelihood_rolling", doc, (text,), 0, ("roll", number, 1))
        for number, (doc, text) in enumerate(zip(rows, texts, strict=True))
    ]
    for doc, text, score in zip(rows, texts, lm.loglikelihood_rolling(requests), strict=True):
        ids = [tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]
        expected, done = 0.0, 1
        while done < len(ids):
            end = min(done + 40, len(ids))
            logprobs = hand.logits(ids[max(0, end - 41) : end - 1], *expected_row(doc), 0).double().log_softmax(-1)
            expected += float(sum(logprobs[i - end, ids[i]] for i in range(done, end)))
            done = end
        assert close(score, expected)


def test_half_precision(make_attention_lm, make_llm, docs, generation):
    lm = make_attention_lm(layers=SOME, pretrained=make_llm("llama").to(torch.bfloat16))
    assert len(lm.generate_until(generation(docs))) == len(docs)
    assert {weight.dtype for weight in lm.store._device_pool.weights} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_experts_in_fewer_bits(make_attention_lm, docs, choices, tmp_path, dtype):
    """Nearly the same likelihoods, another fingerprint, and a folder of their own."""
    plain = make_attention_lm(expert_store=str(tmp_path))
    small = make_attention_lm(expert_dtype=dtype, expert_store=str(tmp_path))
    expected, found = (lm.loglikelihood(choices(docs)) for lm in (plain, small))
    assert found != expected
    assert all(abs(one - other) < 0.05 * abs(other) for (one, _), (other, _) in zip(found, expected, strict=True))
    assert small.fingerprint != plain.fingerprint and len(list(tmp_path.iterdir())) == 2
    assert small.store._device_pool.weights[0].dtype == getattr(torch, dtype)
    assert make_attention_lm(expert_dtype=dtype, expert_store=str(tmp_path)).loglikelihood(choices(docs)) == found
    with pytest.raises(InputError, match="expert_dtype=int4: not one of float32, float16, bfloat16, int8"):
        make_attention_lm(expert_dtype="int4")


def test_experts_on_disk_are_those_of_these_very_weights(make_llm):
    """Also where two LLMs have one name and the same embeddings, as with an adapter that was trained on."""
    one, other = make_llm("llama"), make_llm("llama")
    assert weights_sample(one) == weights_sample(other)
    with torch.no_grad():
        other.model.layers[1].self_attn.k_proj.weight += 1
    assert weights_sample(one) != weights_sample(other)


def test_some_of_a_checkpoints_layers_are_a_checkpoint_of_these(make_attention_lm, make_lm, docs, generation):
    """Whatever their order, and the fingerprint tells them from all layers."""
    expected = make_attention_lm(layers=SOME).generate_until(generation(docs))
    found = make_attention_lm(expert_layers="2+0")
    assert found.generate_until(generation(docs)) == expected
    assert found.fingerprint == make_attention_lm(expert_layers="0+2").fingerprint
    assert found.fingerprint != make_attention_lm().fingerprint
    for wrong, message in (("0+7", "no experts in layer 7, only in 0"), ("1,2", "with \\+ between them")):
        with pytest.raises(InputError, match=message):
            make_attention_lm(expert_layers=wrong)
    with pytest.raises(InputError, match="for experts in the attention"):
        make_lm(expert_layers=1)
