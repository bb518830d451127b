"""`GenPoEModel` and ``lm_eval --model genpoe`` give the same answers in every mode."""

from __future__ import annotations

import pytest
import torch
import yaml
from lm_eval.api.instance import Instance

from genpoe_plugin import GenPoEModel, registration
from genpoe_plugin.prompts import MAX_NEW_TOKENS, MODES, STOP, closed_book_prompt


@pytest.fixture
def inputs(docs, expected_row):
    """Questions with their passages and gates."""
    rows = [expected_row(doc) for doc in docs]
    return [doc["question"] for doc in docs], [strings for strings, _ in rows], [gates for _, gates in rows]


def test_the_fifteen_lines(tmp_path, llm_dir, hypernetwork_dir, docs, evaluate, expected_row):
    """A model, a saved and reloaded copy of it, and the lm-eval model give the same answer."""
    model = GenPoEModel.from_pretrained(llm_dir, hypernetwork_dir, dtype="float32")
    doc = next(doc for doc in docs if len(doc["ctxs"]) == 2)
    passages, gates = expected_row(doc)
    answers = model.generate([doc["question"]], [passages], [gates])
    model.save_pretrained(tmp_path / "saved")
    reloaded = GenPoEModel.from_pretrained(llm_dir, tmp_path / "saved", dtype="float32")

    prompt = model.tokenizer(closed_book_prompt(doc["question"]), return_tensors="pt")
    tokens = []
    for variant in (model, reloaded):
        with variant.experts([passages], [gates]):
            tokens.append(variant.llm.generate(**prompt, max_new_tokens=MAX_NEW_TOKENS, do_sample=False))
    assert torch.equal(*tokens)
    assert reloaded.generate([doc["question"]], [passages], [gates]) == answers
    assert answers != model.generate([doc["question"]], mode="closed_book")

    registration.install()
    arguments = {"pretrained": str(llm_dir), "dtype": "float32", "hypernetwork": str(tmp_path / "saved")}
    samples = evaluate("genpoe", "genpoe_demo", model_args=arguments, device="cpu")["samples"]["genpoe_demo"]
    (lm_eval_answer,) = [sample["resps"][0] for sample in samples if sample["doc"]["question"] == doc["question"]]
    assert lm_eval_answer == answers


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", [{}, {"head": "factored", "states": "contextual"}, "attention"], ids=str)
def test_answers_and_likelihoods(
    make_lm, make_hypernetwork_dir, inputs, docs, generation, llm, tokenizer, tmp_path, mode, form
):
    """The questions have zero to four passages, and the batch sizes differ."""
    if form == "attention":
        from genpoe_plugin.training.creation import attention_config, create_attention_experts

        directory = tmp_path / "experts"
        create_attention_experts(directory, attention_config(llm, (0, 2)), llm, tokenizer)
    else:
        directory = make_hypernetwork_dir(**form)
    lm = make_lm(mode, batch_size=4, **({"hypernetwork": str(directory)} if mode.startswith("genpoe") else {}))
    model = GenPoEModel.from_pretrained(llm, directory, tokenizer=tokenizer)
    expected = lm.generate_until(generation(docs, until=[STOP], max_gen_toks=8))
    assert model.generate(*inputs, mode=mode, batch_size=3, max_new_tokens=8) == expected
    choices = ["Rossini", "Canberra, 1913", "a", "Zürich", "Pesaro", "1913"]
    requests = [
        Instance("loglikelihood", doc, (closed_book_prompt(doc["question"]), f" {choice}"), 0, ("t", number, 1))
        for number, (doc, choice) in enumerate(zip(docs, choices, strict=True))
    ]
    scores = [score for score, _ in lm.loglikelihood(requests)]
    assert model.score(inputs[0], choices, *inputs[1:], mode=mode, batch_size=4) == pytest.approx(scores, abs=1e-4)


@pytest.mark.parametrize("mode", ["rag", "genpoe_rag"])
def test_where_the_prompt_gets_too_long_the_same_passages_are_left_out(
    make_llm, tokenizer, make_lm, docs, generation, inputs, mode, hypernetwork_dir
):
    """Whole passages are left out, the last ones first; all passages become experts."""
    llm = make_llm("llama", max_position_embeddings=90)
    model = GenPoEModel(llm, tokenizer, hypernetwork_dir)
    in_prompt = [row.num_in_prompt for row in model._build_rows(*inputs, mode, 8)]
    assert any(0 < count < len(own) for count, own in zip(in_prompt, inputs[1], strict=True)), in_prompt
    lm = make_lm(mode, pretrained=llm)
    assert lm.max_length == 90
    assert model.generate(*inputs, mode=mode, max_new_tokens=8) == lm.generate_until(
        generation(docs, until=[STOP], max_gen_toks=8)
    )


def test_an_answer_ends_where_the_tasks_end_it():
    from genpoe_plugin.registration import task_folder

    with (task_folder() / "_open_qa.yaml").open() as file:
        settings = yaml.load(file.read().replace("!function", ""), yaml.BaseLoader)["generation_kwargs"]
    assert settings == {"until": [STOP], "do_sample": "false", "max_gen_toks": str(MAX_NEW_TOKENS)}
