"""Reranker data made from retrieval results, and read back."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from genpoe_plugin.data.answers import has_answer
from genpoe_plugin.errors import InputError
from genpoe_plugin.selection.reranking import DEFAULT_PROMPT
from genpoe_plugin.training import reranker_data
from genpoe_plugin.training.reranker_data import RerankerDataCounts, RerankerExample, read_examples, write_reranker_data

REAL = Path(__file__).parents[2].parent / "shared" / "data" / "nq" / "nq-open-gold-passages.jsonl.gz"


def ctx(title: str, text: str, **more: Any) -> dict[str, Any]:
    return {"id": f"{title}-{text}", "title": title, "text": text, "score": "1.5", **more}


def write_results(path: Path, questions: Sequence[tuple[str, list[str], list[dict[str, Any]]]]) -> Path:
    lines = [json.dumps({"question": q, "answers": a, "ctxs": ctxs}) for q, a, ctxs in questions]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Four questions: a usable one, one without a positive, one without negatives, a usable one with flags missing."""
    return write_results(
        tmp_path / "results.jsonl",
        [
            (
                "Who?",
                ["Ada"],
                [
                    ctx("B", "second", has_answer=False),
                    ctx("A", "It was Ada.", has_answer=True),
                    ctx("A", "It was Ada.", has_answer=True),
                    ctx("B", "second", has_answer=False),
                    ctx("", "no title", has_answer=False),
                    ctx("C", "third", has_answer=False),
                ],
            ),
            ("Where?", ["Rome"], [ctx("D", "nothing", has_answer=False)]),
            ("When?", ["1913"], [ctx("E", "In 1913.", has_answer=True)]),
            ("What?", ["opéra"], [ctx("F", "An OPÉRA."), ctx("Opéra", "in the title only")]),
        ],
    )


def test_positives_and_negatives_in_the_retrievers_order(results: Path, tmp_path: Path) -> None:
    counts = write_reranker_data([results], tmp_path / "out.jsonl", negatives=2, min_negatives=1)
    assert counts == RerankerDataCounts(questions=4, written=2, without_positive=1, too_few_negatives=1)
    assert records(tmp_path / "out.jsonl") == [
        {"query": "Who?", "pos": ["A: It was Ada."], "neg": ["B: second", "no title"], "prompt": DEFAULT_PROMPT},
        {"query": "What?", "pos": ["F: An OPÉRA."], "neg": ["Opéra: in the title only"], "prompt": DEFAULT_PROMPT},
    ]


def test_what_is_written_is_read(results: Path, tmp_path: Path) -> None:
    write_reranker_data([results], tmp_path / "out.jsonl.gz", min_negatives=2, prompt="Well?")
    assert read_examples(tmp_path / "out.jsonl.gz") == [
        RerankerExample("Who?", ("A: It was Ada.",), ("B: second", "no title", "C: third"), "Well?")
    ]


def test_several_files(results: Path, tmp_path: Path) -> None:
    counts = write_reranker_data([results, results], tmp_path / "out.jsonl", min_negatives=1)
    assert (counts.questions, counts.written) == (8, 4)


@pytest.mark.parametrize(("given", "least", "most"), [({}, 32, 32), ({"min_negatives": 31}, 31, 32)])
def test_thirty_two_negatives_or_a_stated_minimum(tmp_path: Path, given: dict[str, int], least: int, most: int) -> None:
    questions = [
        (f"q{count}?", ["Ada"], [ctx("A", "Ada"), *(ctx("N", str(number)) for number in range(count))])
        for count in range(29, 35)
    ]
    results = write_results(tmp_path / "r.jsonl", questions)
    counts = write_reranker_data([results], tmp_path / "out.jsonl", **given)
    sizes = [len(record["neg"]) for record in records(tmp_path / "out.jsonl")]
    assert sizes == [min(count, most) for count in range(29, 35) if count >= least]
    assert counts == RerankerDataCounts(6, len(sizes), 0, 6 - len(sizes))


def test_memory_does_not_grow_with_the_results(tmp_path: Path) -> None:
    """DPR's form, one JSON list of many questions; what is written is counted to be all of them."""
    passages = [ctx("A", "It was Ada."), *(ctx("N", f"{number} " + "word " * 100) for number in range(32))]
    question = json.dumps({"question": "Who?", "answers": ["Ada"], "ctxs": passages}, indent=4)
    peaks = []
    for count in (20, 150):
        path = tmp_path / f"{count}.json"
        path.write_text("[" + ",\n".join([question] * count) + "]")
        tracemalloc.start()
        assert write_reranker_data([path], tmp_path / "out.jsonl").written == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        size = path.stat().st_size
    assert peaks[1] < peaks[0] + 0.02 * size
    assert peaks[1] < 0.3 * size


@pytest.fixture
def gold(tmp_path: Path) -> Path:
    """Thirty questions, each with its own passage only, as files of gold passages are; three share an answer."""
    questions = [(f"q{i}?", [f"a{i % 27}"], [ctx(f"T{i}", f"says a{i % 27}", has_answer=True)]) for i in range(30)]
    return write_results(tmp_path / "gold.jsonl", questions)


def test_random_negatives_come_from_other_questions_and_hold_no_answer(gold: Path, tmp_path: Path) -> None:
    counts = write_reranker_data([gold], tmp_path / "out.jsonl", negatives=8, random_negatives=True)
    assert counts == RerankerDataCounts(30, 30, 0, 0)
    negatives = [record["neg"] for record in records(tmp_path / "out.jsonl")]
    everything = {f"T{i}: says a{i % 27}" for i in range(30)}
    for index, neg in enumerate(negatives):
        assert len(neg) == len({*neg}) == 8
        assert {*neg} <= everything
        assert not any(has_answer(text, [f"a{index % 27}"]) for text in neg)
    assert len({tuple(neg) for neg in negatives}) == 30


def test_random_negatives_fill_up_after_the_retrieved(tmp_path: Path) -> None:
    questions = [(f"q{i}?", [f"a{i}"], [ctx(f"T{i}", f"a{i}"), ctx(f"N{i}", "nothing")]) for i in range(6)]
    write_reranker_data(
        [write_results(tmp_path / "r.jsonl", questions)], tmp_path / "out.jsonl", negatives=4, random_negatives=True
    )
    for index, record in enumerate(records(tmp_path / "out.jsonl")):
        assert record["neg"][0] == f"N{index}: nothing"
        assert len({*record["neg"]}) == 4
        assert record["pos"][0] not in record["neg"]


def test_random_negatives_are_decided_by_the_seed(gold: Path, tmp_path: Path) -> None:
    texts = []
    for seed in (0, 0, 1):
        write_reranker_data([gold], tmp_path / "out.jsonl", negatives=5, random_negatives=True, seed=seed)
        texts.append((tmp_path / "out.jsonl").read_text())
    assert texts[0] == texts[1] != texts[2]


def test_the_pool_is_a_bounded_sample_of_everything(
    gold: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reranker_data, "POOL_SIZE", 6)
    seen: set[str] = set()
    for seed in range(20):
        write_reranker_data([gold], tmp_path / "out.jsonl", negatives=4, random_negatives=True, seed=seed)
        drawn = {text for record in records(tmp_path / "out.jsonl") for text in record["neg"]}
        assert len(drawn) <= 6
        seen |= drawn
    assert len(seen) > 25


@pytest.mark.parametrize(("negatives", "least"), [(0, 0), (2, 3), (4, 0)])
def test_impossible_counts(results: Path, tmp_path: Path, negatives: int, least: int) -> None:
    with pytest.raises(InputError, match="negatives"):
        write_reranker_data([results], tmp_path / "out.jsonl", negatives=negatives, min_negatives=least)


def test_no_usable_question_writes_nothing(gold: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gold\.jsonl: none of 30 questions .* at least 1 without"):
        write_reranker_data([gold], tmp_path / "out.jsonl", min_negatives=1)
    assert [path.name for path in tmp_path.iterdir()] == ["gold.jsonl"]


def test_a_malformed_result_writes_nothing(results: Path, tmp_path: Path) -> None:
    results.write_text(results.read_text() + "\n{broken")
    with pytest.raises(InputError, match=r"results\.jsonl:5"):
        write_reranker_data([results], tmp_path / "out.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["results.jsonl"]


GOOD = {"query": "q", "pos": ["p"], "neg": ["n"]}


def test_a_line_without_prompt_has_the_default(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write(json.dumps(GOOD) + "\n\n" + json.dumps({**GOOD, "prompt": DEFAULT_PROMPT}) + "\n")
    assert read_examples(path) == [RerankerExample("q", ("p",), ("n",), DEFAULT_PROMPT)] * 2


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "JSON"),
        ("[1]", "JSON object"),
        (json.dumps({**GOOD, "query": " "}), '"query"'),
        (json.dumps({**GOOD, "query": 7}), '"query"'),
        (json.dumps({"pos": ["p"], "neg": ["n"]}), '"query"'),
        (json.dumps({**GOOD, "pos": []}), '"pos"'),
        (json.dumps({**GOOD, "pos": "p"}), '"pos"'),
        (json.dumps({**GOOD, "neg": [""]}), '"neg"'),
        (json.dumps({**GOOD, "neg": [None]}), '"neg"'),
        (json.dumps({**GOOD, "prompt": None}), '"prompt"'),
        (json.dumps({**GOOD, "prompt": "another"}), "prompt"),
        (json.dumps({**GOOD, "query": "\ud800"}), "surrogate"),
    ],
)
def test_malformed_lines_are_named(tmp_path: Path, line: str, complaint: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + line + "\n")
    with pytest.raises(InputError) as error:
        read_examples(path)
    assert f"{path}:2" in str(error.value)
    assert complaint in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_no_examples(tmp_path: Path, content: str) -> None:
    (tmp_path / "data.jsonl").write_text(content)
    with pytest.raises(InputError, match="no examples"):
        read_examples(tmp_path / "data.jsonl")


@pytest.mark.skipif(not REAL.exists(), reason="needs the NQ passages of ../shared/data beside the repository")
def test_real_gold_passages(tmp_path: Path) -> None:
    counts = write_reranker_data([REAL], tmp_path / "out.jsonl", negatives=3, min_negatives=3, random_negatives=True)
    assert counts.questions == counts.written == 1800
    examples = read_examples(tmp_path / "out.jsonl")
    assert all(len({*example.neg}) == 3 and not {*example.pos} & {*example.neg} for example in examples)
