from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from genpoe_plugin.prompts import (
    closed_book_prompt,
    cut_passages,
    find_question,
    first_token_at,
    last_question,
    normalise_question,
    rag_prompt,
    tokens_from,
    with_knowledge,
)

CHAT = "<s><|user|>\nQ: who wrote it\n<|assistant|>\n"
FEW_SHOT = "Question: Who sang?\nAnswer: Ann\n\nQuestion: Who wrote it?\nAnswer:"


def test_prompts_are_exactly_these():
    assert closed_book_prompt("who wrote it") == "Question: Who wrote it?\nAnswer:"
    assert rag_prompt("who wrote it?", ["A: one", "two"]) == (
        "Knowledge:\nA: one\ntwo\nQuestion: Who wrote it?\nAnswer:"
    )
    assert rag_prompt("who wrote it", []) == closed_book_prompt("who wrote it")


@given(st.text())
def test_normalising_twice_changes_nothing(question):
    once = normalise_question(question)
    assert normalise_question(once) == once
    assert once.endswith("?")


def test_normalising_keeps_the_rest_of_the_case():
    assert normalise_question(" is NASA in DC ") == "Is NASA in DC?"


@pytest.mark.parametrize(
    ("context", "question", "found"),
    [
        pytest.param(FEW_SHOT, "who wrote it", "Question: Who wrote it?\nAnswer:", id="few-shot"),
        pytest.param("Question: who wrote it\nA:", "who wrote it", "Question: who wrote it\nA:", id="not normalised"),
        pytest.param(CHAT, "who wrote it", "Q: who wrote it\n<|assistant|>\n", id="chat, short label"),
        pytest.param("Say: this. who wrote it", "who wrote it", "who wrote it", id="no label directly before"),
        pytest.param("Question:\nwho wrote it", "who wrote it", "Question:\nwho wrote it", id="label on its own line"),
        pytest.param(FEW_SHOT, "something else", "Question: Who wrote it?\nAnswer:", id="last Question:"),
        pytest.param(FEW_SHOT, None, "Question: Who wrote it?\nAnswer:", id="question not known"),
        pytest.param("The sky is", None, "The sky is", id="the whole context"),
        pytest.param("<s>The sky is", "of another task", "The sky is", id="after BOS"),
    ],
)
def test_the_question_is_found(context, question, found):
    assert context[find_question(context, question, "<s>") :] == found


def test_an_earlier_copy_of_the_question_is_not_taken():
    context = closed_book_prompt("who wrote it") + " Ann\n\n" + closed_book_prompt("who wrote it")
    assert find_question(context, "who wrote it") == len(context) // 2 + 3


def test_the_query_of_a_prompt():
    assert last_question(FEW_SHOT) == "Who wrote it?"
    assert last_question("<s>The sky is", "<s>") == "The sky is"
    assert last_question("Question:") == "Question:"
    assert len(last_question("word " * 5000).split()) == 100


def test_knowledge_goes_right_before_the_question():
    prompt = with_knowledge(FEW_SHOT, "who wrote it", ["one", "two"], fits=lambda _: True)
    assert prompt.text == ("Question: Who sang?\nAnswer: Ann\n\nKnowledge:\none\ntwo\nQuestion: Who wrote it?\nAnswer:")
    assert prompt.passages == 2
    assert prompt.text[prompt.question_at :] == "Question: Who wrote it?\nAnswer:"
    assert with_knowledge("<s>The sky", None, ["one"], fits=lambda _: True, bos="<s>").text == (
        "<s>Knowledge:\none\nThe sky"
    )


def test_whole_passages_are_dropped_worst_first():
    question = closed_book_prompt("who wrote it")
    room = len(rag_prompt("who wrote it", ["best", "good"]))
    prompt = with_knowledge(question, "who wrote it", ["best", "good", "bad"], fits=lambda text: len(text) <= room)
    assert prompt.text == rag_prompt("who wrote it", ["best", "good"])
    assert prompt.passages == 2
    prompt = with_knowledge(question, "who wrote it", ["best", "good"], fits=lambda text: False)
    assert (prompt.text, prompt.passages, prompt.question_at) == (question, 0, None)


def test_an_empty_context_stays_empty():
    assert with_knowledge("", "who wrote it", ["one"], fits=lambda _: True).text == ""


def test_special_tokens_overlap_nothing():
    assert first_token_at([(0, 0), (0, 3), (3, 6), (6, 9)], 0) == 1
    assert first_token_at([(0, 0), (0, 3), (3, 6), (6, 9)], 3) == 2
    assert first_token_at([(0, 0), (0, 3), (3, 6), (6, 9)], 4) == 2, "a token that overlaps in part counts"
    assert first_token_at([(0, 3), (0, 0)], 3) == 2


@pytest.mark.parametrize("bos", [True, False])
def test_the_question_part_is_exactly_its_own_tokens(tokenizer, bos):
    """Research code: one token off with BOS."""
    text = rag_prompt("who wrote it", ["Rossini: Gioachino Rossini was an Italian composer.", "Zürich 東京"])
    place = text.rindex("Question:")
    ids = tokenizer(text, add_special_tokens=bos)["input_ids"]
    count = tokens_from(text, place, tokenizer)
    assert tokenizer.decode(ids[len(ids) - count :]) == text[place:]
    assert tokenizer.decode(ids[: len(ids) - count], skip_special_tokens=True) == text[:place]


@given(st.text(alphabet="aé東 \n🙂.Q", max_size=80), st.integers(1, 30))
def test_passages_are_cut_at_a_token(tokenizer, passage, limit):
    (cut,) = cut_passages([passage], tokenizer, limit)
    whole = tokenizer(passage, add_special_tokens=False)["input_ids"]
    ids = tokenizer(cut, add_special_tokens=False)["input_ids"]
    assert len(ids) <= limit
    assert passage.startswith(cut)
    if len(whole) <= limit:
        assert cut == passage


def test_a_long_passage_keeps_256_tokens(tokenizer):
    cut, short = cut_passages(["capital and country " * 500, "short"], tokenizer)
    assert 250 < len(tokenizer(cut, add_special_tokens=False)["input_ids"]) <= 256
    assert short == "short"
