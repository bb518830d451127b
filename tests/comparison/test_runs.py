"""Reading lm_eval's folders: what is there, and what is left out by name."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from benchmarks.synthetic_results import documents, genpoe_facts, write_run
from genpoe_plugin.comparison.leaderboard import compare
from genpoe_plugin.comparison.output_files import record
from genpoe_plugin.comparison.report_types import TYPES
from genpoe_plugin.comparison.runs import QuestionBook, read_runs
from genpoe_plugin.errors import InputError

DOCS = documents(6, passages=3)
EM, F1 = [1.0, 0, 0, 1, 0, 1], [1.0, 0.5, 0, 1, 0.25, 1]


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return write_run(tmp_path / "good", {"em": EM, "f1": F1}, docs=DOCS)


def samples_of(results: Path) -> Path:
    return results.with_name(results.name.replace("results_", "samples_t_")).with_suffix(".jsonl")


def test_scores_ranks_and_samples_are_by_question(tmp_path: Path, good: Path) -> None:
    """The second run has the same questions in another order."""
    order = [3, 0, 5, 1, 2, 4]
    scores = {"em": [EM[n] for n in order], "f1": [F1[n] for n in order]}
    write_run(tmp_path / "other", scores, docs=[DOCS[n] for n in order])
    book = QuestionBook()
    runs, left_out = read_runs([tmp_path], book)
    assert not left_out
    for run in runs:
        assert [book.texts[number] for number in run.questions] == [doc["question"] for doc in DOCS]
        assert run.scores["em"].tolist() == EM and run.scores["f1"].tolist() == F1
        assert run.ranks.tolist() == [1, 2, 3, 0, 0, 1]
        assert [run.sample(place)["doc"]["question"] for place in range(6)] == [doc["question"] for doc in DOCS]


def test_the_rank_is_the_rerankers_where_there_is_one(tmp_path: Path) -> None:
    doc = dict(DOCS[0], ctxs=[dict(ctx, rerank_rank=3 - at) for at, ctx in enumerate(DOCS[0]["ctxs"])])
    unmarked = dict(DOCS[1], ctxs=[dict(ctx, has_answer=None) for ctx in DOCS[1]["ctxs"]])
    write_run(tmp_path, {"em": [1.0, 0]}, docs=[doc, unmarked])
    (run,), _ = read_runs([tmp_path], QuestionBook())
    assert run.ranks.tolist() == [3, -1]


def test_a_question_that_is_asked_twice_counts_twice(tmp_path: Path) -> None:
    write_run(tmp_path, {"em": [1.0, 0, 1]}, docs=[DOCS[0], DOCS[0], DOCS[1]])
    (run,), _ = read_runs([tmp_path], QuestionBook())
    assert len(set(run.questions.tolist())) == 3


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def one_less(path: Path) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def other_score(path: Path) -> None:
    first, *rest = path.read_text().splitlines(keepends=True)
    path.write_text(first.replace('"em": 1.0', '"em": 0.0') + "".join(rest))


def other_question(path: Path) -> None:
    first, *rest = path.read_text().splitlines(keepends=True)
    record = json.loads(first) | {"doc_hash": "0" * 64}
    path.write_text(json.dumps(record) + "\n" + "".join(rest))


def without(name: str):
    def drop(path: Path) -> None:
        records = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps({k: v for k, v in r.items() if k != name}) + "\n" for r in records))

    return drop


@pytest.mark.parametrize(
    ("which", "damage", "said"),
    [
        ("results", truncate, "not valid JSON"),
        ("results", lambda path: path.write_text("[1]"), "not the results of lm_eval"),
        ("results", lambda path: path.write_text('{"results": {}}'), "configs, versions, config, n-shot missing"),
        ("samples", Path.unlink, "run lm_eval with --log_samples"),
        ("samples", truncate, "t_2026-01-01T00-00-00.000000.jsonl:6: not valid JSON"),
        ("samples", one_less, "has 5 of 6 questions"),
        ("samples", lambda path: path.write_text(""), "is empty"),
        ("samples", other_score, "em is 0.5000 in the results and 0.3333 over the samples"),
        ("samples", other_question, "does not belong to these results"),
        ("samples", without("em"), "6 samples have no em"),
        ("samples", without("doc_id"), "not in lm_eval's format"),
        ("samples", without("prompt_hash"), "not lm_eval's samples (no 'prompt_hash')"),
    ],
)
def test_what_is_broken_is_left_out_by_name(tmp_path: Path, good: Path, which: str, damage, said: str) -> None:
    broken = write_run(tmp_path / "broken", {"em": EM, "f1": F1}, docs=DOCS)
    damage(broken if which == "results" else samples_of(broken))
    comparison = compare([tmp_path], draws=20)
    assert [run.results for board in comparison.boards for s in board.systems for run in s.runs] == [good]
    (entry,) = comparison.left_out
    assert entry.path == broken
    assert said in entry.reason
    with pytest.raises(InputError, match="nothing to compare"):
        compare([tmp_path / "broken"])


def test_any_damage_is_told(tmp_path: Path, good: Path) -> None:
    """Values of either file changed to what does not belong there: never a traceback, and never another mean."""
    rng = random.Random(0)
    for turn in range(150):
        broken = write_run(tmp_path / "broken", {"em": EM, "f1": F1}, docs=DOCS)
        path = broken if turn % 2 else samples_of(broken)
        text = path.read_text()
        at = rng.randrange(len(text))
        path.write_text(text[:at] + rng.choice(["", "{", "0", "null", '"', "[]", "x", "\n"]) + text[at + 1 :])
        comparison = compare([tmp_path], draws=10)
        for board in comparison.boards:
            for system in board.systems:
                assert system.scores["em"].mean() == pytest.approx(0.5)


@pytest.mark.parametrize("path", ["nothing", "folder"])
def test_no_results_is_one_clear_line(tmp_path: Path, path: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=r"no such file or folder|no lm_eval results"):
        compare([tmp_path / path])


def test_a_metric_that_is_no_mean_is_named_and_not_compared(tmp_path: Path) -> None:
    """As MQuAKE's multi-hop accuracy, of which a sample has case and EM."""
    em = [1.0, 0, 0, 1]
    results = write_run(tmp_path, {"em": em}, docs=DOCS[:4])
    report = json.loads(results.read_text())
    report["results"]["t"]["multihop_acc,none"] = 1.0
    report["configs"]["t"]["metric_list"].append({"metric": "multihop_acc", "aggregation": "def any_of_a_case"})
    results.write_text(json.dumps(report))
    lines = [json.loads(line) for line in samples_of(results).read_text().splitlines()]
    pairs = [line | {"multihop_acc": [n // 2, em[n]]} for n, line in enumerate(lines)]
    samples_of(results).write_text("".join(json.dumps(line) + "\n" for line in pairs))
    comparison = compare([tmp_path], draws=20)
    assert comparison.boards[0].metrics == ("em",)
    assert any("multihop_acc is not a mean over questions" in note for note in comparison.notes)


def test_nan_is_no_score(tmp_path: Path) -> None:
    write_run(tmp_path, {"em": [1.0, float("nan")]}, docs=DOCS[:2])
    with pytest.raises(InputError, match="nothing to compare"):
        compare([tmp_path])


def test_passages_are_those_of_the_trace(tmp_path: Path) -> None:
    write_run(tmp_path, {"em": EM}, docs=DOCS, genpoe=genpoe_facts(num_passages=2), trace=True)
    comparison = compare([tmp_path], draws=20)
    (system,) = comparison.boards[0].systems
    assert system.used.answer_given.tolist() == [1, 1, 0, 0, 0, 1] and system.used.ranks.tolist() == [1, 2, 3, 0, 0, 1]
    part = system.by_given
    assert (part["present"].n, part["absent"].n) == (3, 3)
    assert part["present"].mean == pytest.approx(np.mean([EM[0], EM[1], EM[5]]))
    assert {name: (e.n, e.mean) for name, e in system.by_rank.items()} == {
        "1": (2, 1.0),
        "2": (1, 0.0),
        "3": (1, 0.0),
        "not found": (2, 0.5),
    }


def test_lines_of_other_prompts_and_docs_are_passed_over(tmp_path: Path) -> None:
    """A run with a response cache traces all that is in the cache."""
    for folder in ("a", "b"):
        write_run(tmp_path / folder, {"em": EM[:5]}, docs=DOCS[:5], genpoe=genpoe_facts(num_passages=2), trace=True)
    trace = tmp_path / "b" / "trace.jsonl"
    lines = [json.loads(line) for line in trace.read_text().splitlines()]
    others = [{**line, "prompt_hash": "0" * 64, "passages": [], "prompt": "other"} for line in lines]
    others += [{**line, "doc_id": line["doc_id"] + 7, "prompt_hash": "1" * 64} for line in others]
    trace.write_text("".join(json.dumps(line) + "\n" for line in [*others, *lines, *others]))
    used = [compare([tmp_path / folder], draws=20).boards[0].systems[0].used for folder in ("a", "b")]
    assert used[0].answer_given.tolist() == used[1].answer_given.tolist() == [1, 1, 0, 0, 0]
    assert all("other" not in used[1].line(place)["prompt"] for place in range(5))


@pytest.mark.parametrize(
    "wrong", ["[]", "{}", '{"task": "t", "mode": "genpoe", "hypernetwork": "hypernetwork-fingerprint"}']
)
def test_what_is_no_trace_is_told(tmp_path: Path, wrong: str) -> None:
    write_run(tmp_path, {"em": EM}, docs=DOCS, genpoe=genpoe_facts(), trace=True)
    (tmp_path / "trace.jsonl").write_text(wrong)
    (note,) = compare([tmp_path], draws=20).notes
    assert "passages unknown" in note and "not a trace" in note


@pytest.mark.parametrize("wrong", ["another run", "too short"])
def test_the_trace_of_another_run_is_not_used(tmp_path: Path, wrong: str) -> None:
    write_run(tmp_path, {"em": EM}, docs=DOCS, genpoe=genpoe_facts(), trace=True)
    trace = tmp_path / "trace.jsonl"
    lines = trace.read_text().splitlines(keepends=True)
    trace.write_text("".join(lines).replace('"genpoe"', '"rag"') if wrong == "another run" else "".join(lines[:-1]))
    comparison = compare([tmp_path], draws=20)
    assert comparison.boards[0].systems[0].used is None
    assert len(comparison.notes) == 1 and "passages unknown" in comparison.notes[0]


def test_a_null_in_a_report_is_a_missing_value(tmp_path: Path) -> None:
    """Whichever of the values that a comparison uses."""

    def places(types: dict, names: tuple[str, ...] = ()):
        for name, check in types.items():
            yield (*names, name)
            yield from places(check, (*names, name)) if isinstance(check, dict) else ()

    found = [names for names in places(TYPES) if names != ("config",)]
    assert ("config", "genpoe", "peak_memory", "of") in found
    for number, names in enumerate(found):
        path = write_run(
            tmp_path / str(number), {"em": [1.0, 0.0]}, docs=documents(2, passages=1), genpoe=genpoe_facts(), trace=True
        )
        report = json.loads(path.read_text())
        holder = report
        for name in names[:-1]:
            holder = holder[name]
        holder[names[-1]] = None
        path.write_text(json.dumps(report))
        told = record(compare([tmp_path / str(number)], draws=20))
        assert len(told["boards"][0]["systems"]) == 1 and told["left_out"] == []
