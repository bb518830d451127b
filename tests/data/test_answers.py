from __future__ import annotations

import gzip
import json
import random
import string
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genpoe_plugin.data.answers import (
    ABSTENTIONS,
    abstains,
    contains,
    exact_match,
    f1,
    has_answer,
    normalize_answer,
    popqa_accuracy,
    rouge_l,
    token_scores,
)

SQUAD = Path(__file__).parents[3] / "shared" / "data" / "squad" / "squad-v1.1-part.json.gz"

# Words that the normalisation touches, so that random texts overlap and hit its rules often.
WORDS = st.sampled_from(
    [
        "the",
        "The",
        "a",
        "an",
        "A.",
        "another",
        "J.R.R.",
        "JRR",
        "Tolkien",
        "1,000",
        "1000",
        "St.",
        "Louis",
        "-",
        "Zürich",
    ]
)
TEXTS = st.lists(WORDS | st.text(max_size=4), max_size=6).map(" ".join)


def squad_normalize(text: str) -> str:
    """SQuAD v1.1's steps, word by word: lower case, punctuation, articles, white space."""
    kept = "".join(character for character in text.lower() if character not in set(string.punctuation))
    out, word = [], ""
    for character in [*kept, " "]:
        if character.isalnum() or character == "_":
            word += character
        else:
            out += [" " if word in ("a", "an", "the") else word, character]
            word = ""
    return " ".join("".join(out).split())


def squad_f1(prediction: str, answer: str) -> float:
    predicted, gold = squad_normalize(prediction).split(), squad_normalize(answer).split()
    remaining, shared = list(gold), 0
    for word in predicted:
        if word in remaining:
            remaining.remove(word)
            shared += 1
    if not shared:
        return 0.0
    precision, recall = shared / len(predicted), shared / len(gold)
    return 2 * precision * recall / (precision + recall)


@given(TEXTS)
def test_normalisation_is_squads(text: str) -> None:
    assert normalize_answer(text) == squad_normalize(text)


@given(TEXTS, st.lists(TEXTS, min_size=1, max_size=4))
def test_scores_are_squads(prediction: str, answers: list[str]) -> None:
    assert exact_match(prediction, answers) == max(squad_normalize(prediction) == squad_normalize(a) for a in answers)
    assert f1(prediction, answers) == pytest.approx(max(squad_f1(prediction, answer) for answer in answers))


def perturbed(answer: str, other: str, rng: random.Random) -> str:
    """An answer as a model might give it: in other letters, with words more, fewer or in another order."""
    words = answer.split() or [""]
    for _ in range(rng.randrange(4)):
        at = rng.randrange(len(words))
        word = words[at]
        words[at : at + 1] = rng.choice(
            [
                [word.upper()],
                [word.capitalize()],
                [rng.choice(["the", "A", "an", "The"]), word],
                [f"{word}{rng.choice(string.punctuation)}"],
                [f"{rng.choice(string.punctuation)}{word}"],
                [word, word],
                [word, rng.choice(other.split() or [""])],
                [""],
                [word.replace("-", " ").replace(",", "")],
                [unicodedata.normalize(rng.choice(["NFD", "NFKC"]), word)],
                [f"{word}\n\t "],
            ]
        )
    if rng.random() < 0.1:
        rng.shuffle(words)
    return rng.choice([" ".join(words), " ".join(words), other, f"It is {' '.join(words)}."])


def check_squads(answers: list[list[str]], turns: int) -> None:
    """Against the functions of SQuAD's own script, as transformers has them up to 5.23."""
    squad = pytest.importorskip("transformers.data.metrics.squad_metrics", reason="left transformers in 5.24")
    rng = random.Random(0)
    scores = set()
    for _ in range(turns):
        for accepted in answers:
            prediction = perturbed(rng.choice(accepted), rng.choice(rng.choice(answers)), rng)
            exact = max(squad.compute_exact(answer, prediction) for answer in accepted)
            # Those are of SQuAD 2.0, where no words are an answer: in 1.1 they share none with any.
            blank = not normalize_answer(prediction)
            words = [0.0 if blank else squad.compute_f1(answer, prediction) for answer in accepted]
            assert exact_match(prediction, accepted) == exact, (prediction, accepted)
            assert f1(prediction, accepted) == pytest.approx(max(words), abs=1e-12), (prediction, accepted)
            scores.add((exact, round(max(words), 1)))
    assert {(0, 0.0), (0, 0.5), (0, 0.7), (1, 1.0)} <= scores


def test_scores_are_those_of_squads_script() -> None:
    """On answers of many kinds."""
    texts = ["Saint Bernadette Soubirous", "a golden statue of the Virgin Mary", "the Main Building", "1,250-1,300"]
    texts += ["St. Louis", "J. R. R. Tolkien", "£5.6 million", "Zürich", "The Beatles", "in the 1870s", "Kraków's"]
    check_squads([[text, *texts[at + 1 : at + 3]] for at, text in enumerate(texts)], turns=100)


@pytest.mark.skipif(not SQUAD.exists(), reason="needs SQuAD's part in ../shared/data beside the repository")
def test_scores_are_those_of_squads_script_on_all_its_answers() -> None:
    with gzip.open(SQUAD) as file:
        articles = json.load(file)["data"]
    asked = [entry for article in articles for paragraph in article["paragraphs"] for entry in paragraph["qas"]]
    assert len(asked) == 4_961
    check_squads([[answer["text"] for answer in entry["answers"]] for entry in asked], turns=1)


@pytest.mark.parametrize(
    ("prediction", "answer"),
    [("J.R.R. Tolkien", "JRR Tolkien"), ("1,000", "1000"), ("O'Brien", "OBrien"), (" The  Beatles.", "beatles")],
)
def test_what_squad_takes_for_equal(prediction: str, answer: str) -> None:
    assert exact_match(prediction, ["something else", answer]) == 1.0


def test_what_squad_tells_apart() -> None:
    assert exact_match("3 - 2", ["3-2"]) == 0.0
    assert exact_match("", ["x"]) == f1("", ["x"]) == 0.0
    assert exact_match("x", []) == f1("x", []) == 0.0


def test_f1_counts_words_of_a_bag() -> None:
    # "new york york" and "york new": 2 shared of 3 and of 2.
    assert f1("New York York", ["York, the New", "Boston"]) == pytest.approx(2 * (2 / 3) * 1 / (2 / 3 + 1))


@pytest.mark.parametrize(
    ("prediction", "answers", "right"),
    [
        ("He was a politician.", ["politician"], True),
        ("politicians", ["politician"], True),  # any substring
        ("He was a Politician.", ["politician"], True),  # with a capital
        ("a politician", ["Politician"], True),  # in lower case
        ("A POLITICIAN", ["politician"], False),  # but in no other letters
        ("in new york", ["New York"], True),
        ("in New york", ["new York"], True),
        ("in nEW york", ["New York"], False),
        ("pol", ["polit.", "pol"], True),
        ("an actor", ["politician", "pol"], False),
        ("an actor", [""], False),
        ("an actor", [], False),
        ("", ["actor"], False),
    ],
)
def test_popqa_accuracy(prediction: str, answers: list[str], right: bool) -> None:
    assert popqa_accuracy(prediction, answers) == right


@pytest.mark.parametrize(
    ("prediction", "answers", "right"),
    [
        ("It was written by J.R.R. Tolkien.", ["JRR Tolkien"], True),  # normalised
        ("the answer is The  Beatles, of course", ["a beatles"], True),
        ("politicians", ["politician"], False),  # whole words
        ("Tolkien J.R.R.", ["JRR Tolkien"], False),  # in their order
        ("New old York", ["New York"], False),  # with nothing between them
        ("in 1969", ["July 1969", "1969"], True),  # any answer
        ("1969", ["in 1969"], False),  # the whole answer
        ("The Who", ["The", "?"], False),  # nothing of these is left
        ("", ["1969"], False),
        ("1969", [], False),
    ],
)
def test_contains(prediction: str, answers: list[str], right: bool) -> None:
    assert contains(prediction, answers) == right


@given(st.text(), st.lists(st.text(), max_size=3))
def test_an_exact_match_contains_the_answer(prediction: str, answers: list[str]) -> None:
    if normalize_answer(prediction):
        assert contains(prediction, answers) >= exact_match(prediction, answers)


@given(TEXTS, st.lists(TEXTS, max_size=3))
def test_contains_is_stricter_than_a_substring(prediction: str, answers: list[str]) -> None:
    """FlashRAG's ``acc`` and BERGEN's ``Match`` search the normalised answer in the normalised prediction."""
    normalized = squad_normalize(prediction)
    substring = any(squad_normalize(answer) in normalized for answer in answers)
    words = normalized.split()
    runs = [words[start:end] for start in range(len(words)) for end in range(start + 1, len(words) + 1)]
    assert contains(prediction, answers) == any(squad_normalize(answer).split() in runs for answer in answers)
    assert contains(prediction, answers) <= substring


def test_contains_differs_from_a_substring_within_words_and_for_empty_answers() -> None:
    assert not contains("the catalogue", ["cat"])
    assert not contains("anything", ["the"])


@pytest.mark.parametrize(
    ("prediction", "abstained"),
    [
        ("", True),
        ("  \n", True),
        ("The.", True),  # no word is left
        ("Unanswerable", True),
        ("The answer is unknown.", True),
        ("I don't know", True),
        ("I don\u2019t know.", True),
        ("It is not mentioned in the passage.", True),
        ("N/A", True),
        ("None", True),
        ("No answer", True),
        ("no", False),
        ("1066", False),
        ("the unknowns", False),  # whole words
        ("not in 1066, mentioned as 1067", False),  # in a row
    ],
)
def test_abstains(prediction: str, abstained: bool) -> None:
    assert abstains(prediction) == abstained


@given(TEXTS, st.sampled_from(ABSTENTIONS), TEXTS)
def test_every_phrase_abstains_anywhere(before: str, phrase: str, after: str) -> None:
    assert abstains(f"{before} {phrase.upper()} {after}")


@given(TEXTS, st.lists(TEXTS, max_size=3))
def test_precision_and_recall_are_those_of_the_best_answer(prediction: str, answers: list[str]) -> None:
    words = squad_normalize(prediction).split()
    best = (0.0, 0.0, 0.0)
    for answer in answers:
        gold, shared = squad_normalize(answer).split(), 0
        for word in {*gold}:
            shared += min(words.count(word), gold.count(word))
        if shared and squad_f1(prediction, answer) > best[0] + 1e-9:
            best = (squad_f1(prediction, answer), shared / len(words), shared / len(gold))
    assert token_scores(prediction, answers) == pytest.approx(best)


def test_precision_and_recall_are_not_the_best_of_several_answers() -> None:
    # Against "a long answer here indeed" the recall is 1/4, and against "x y" the precision is 1/2.
    assert token_scores("long x", ["long answer here indeed", "x y"]) == (0.5, 0.5, 0.5)


SHORT = st.lists(st.sampled_from(["a", "bb", "ccc", "d4"]), max_size=8)  # words that stemming leaves alone


@settings(deadline=None)  # the first call loads the package
@given(SHORT, st.lists(SHORT, max_size=3))
def test_rouge_l_is_the_longest_common_subsequence(words: list[str], references: list[list[str]]) -> None:
    def common(left: list[str], right: list[str]) -> int:
        if not left or not right:
            return 0
        if left[0] == right[0]:
            return 1 + common(left[1:], right[1:])
        return max(common(left[1:], right), common(left, right[1:]))

    def score(reference: list[str]) -> float:
        shared = common(words, reference)
        return 2 * shared / (len(words) + len(reference)) if shared else 0.0

    expected = max((score(reference) for reference in references), default=0.0)
    assert rouge_l(" ".join(words), [" ".join(reference) for reference in references]) == pytest.approx(expected)


def test_rouge_l_stems_and_ignores_case_and_punctuation() -> None:
    assert rouge_l("He walked, happily!", ["no", "he WALKS happily"]) == 1.0


@pytest.mark.parametrize(
    ("text", "answer", "found"),
    [
        ("He was born in St. Louis, Missouri.", "st. louis", True),
        ("He was born in St. Louis, Missouri.", "St Louis", False),  # "." is a token
        ("the catalogue", "cat", False),  # whole tokens only
        ("one two three", "two three", True),
        ("one two three", "one three", False),  # a run of tokens
        ("in Zu\u0308rich", "ZÜRICH", True),  # NFD
        ("in Zurich", "Zürich", False),
        ("what\tever\nnext", "ever next", True),  # white space and control characters are no tokens
        ("3-2", "3 - 2", True),
        ("text", "", False),
        ("", "", False),
        ("a \u200b b", "\u200b", False),  # an answer of format characters has no token
        ("", "x", False),
    ],
)
def test_has_answer(text: str, answer: str, found: bool) -> None:
    assert has_answer(text, [answer]) is found
    assert has_answer(text, ["no such answer", answer]) is found


def test_no_answers_are_not_found() -> None:
    assert not has_answer("text", [])


def dpr_tokens(text: str) -> list[str]:
    """DPR's tokens by Unicode category, one character at a time."""
    tokens: list[str] = []
    in_word = False
    for character in unicodedata.normalize("NFD", text):
        category = unicodedata.category(character)[0]
        if category in "LNM":
            tokens = [*tokens[:-1], tokens[-1] + character] if in_word else [*tokens, character]
        elif category not in "ZC":
            tokens.append(character)
        in_word = category in "LNM"
    return [token.lower() for token in tokens]


LATIN = st.characters(max_codepoint=0x24F) | st.sampled_from("Σσς。東京\u0301\u200b")


@given(st.text(LATIN, max_size=12), st.text(LATIN, max_size=3), st.integers(0, 12))
def test_has_answer_is_dprs_match(text: str, answer: str, cut: int) -> None:
    for needle in (answer, text[cut : cut + 3]):
        wanted, tokens = dpr_tokens(needle), dpr_tokens(text)
        runs = [tokens[start : start + len(wanted)] for start in range(len(tokens))]
        assert has_answer(text, [needle]) == (bool(wanted) and wanted in runs)
