"""What is ranked together, what is flagged, and what the outputs say of it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from markdown_it import MarkdownIt
from scipy import stats
from statsmodels.stats.multitest import multipletests

from benchmarks.synthetic_results import documents, genpoe_facts, write_run
from genpoe_plugin.comparison.cells import table
from genpoe_plugin.comparison.leaderboard import NO_KNOWLEDGE, Board, System, compare
from genpoe_plugin.comparison.markdown import markdown
from genpoe_plugin.comparison.output_files import write
from genpoe_plugin.errors import InputError

N = 60
DOCS = documents(N, passages=3)


def scores(share: float, seed: int = 0) -> dict[str, list[float]]:
    """EM of a run; runs of another seed are right on other questions."""
    order = np.random.default_rng(seed).permutation(N)
    return {"em": (order < round(share * N)).astype(float).tolist()}


def facts(*args: object, **more: object) -> dict[str, object]:
    return {"genpoe": genpoe_facts(*args, **more), "trace": True}


def board_of(path: Path, **options: object) -> Board:
    (board,) = compare([path], draws=200, **options).boards
    return board


@pytest.mark.parametrize(
    ("aspect", "other"),
    [
        ("version", {"version": 2.0}),
        ("metrics", {"metric_list": [{"metric": "em", "aggregation": "mean", "higher_is_better": True, "x": 1}]}),
        ("questions", {"docs": DOCS[:50]}),
        ("prompts", {"prompt": "Q: {}?\nA:"}),
        ("prompts", {"chat_template": "{{ messages }}"}),
        ("shots", {"shots": 5}),
        ("decoding", {"generation": {"until": ["\n"], "do_sample": True}}),
        ("passages", {"docs": [dict(doc, ctxs=doc["ctxs"][::-1]) for doc in DOCS], **facts()}),
    ],
)
def test_what_was_not_asked_alike_is_not_ranked_together(tmp_path: Path, aspect: str, other: dict) -> None:
    mine = facts() if aspect == "passages" else {}
    for name, share in (("a", 0.5), ("b", 0.7)):
        write_run(tmp_path / name, scores(share), docs=DOCS, model_args={"pretrained": name}, **mine)
    docs = other.get("docs", DOCS)
    few = {"em": scores(0.9)["em"][: len(docs)]}
    write_run(tmp_path / "c", few, model_args={"pretrained": "c"}, **{"docs": docs, **other})
    first, second = compare([tmp_path], draws=50).boards
    assert [len(board.systems) for board in (first, second)] == [2, 1]
    assert [difference.aspect for difference in second.group.differences] == [aspect]
    text = markdown(compare([tmp_path], draws=50))
    assert f"- {aspect}: " in text and "Not ranked together with the first board" in text
    if aspect == "questions":
        assert "50 of them in both" in text
    else:
        allowed = board_of(tmp_path, allow=[aspect])
        assert len(allowed.systems) == 3
        assert {entry.aspect for entry in allowed.group.allowed} == {aspect}


def test_runs_without_passages_are_ranked_with_those_that_have_some(tmp_path: Path) -> None:
    write_run(tmp_path / "a", scores(0.5), docs=DOCS, **facts())
    write_run(tmp_path / "b", scores(0.2), docs=DOCS, **facts("closed_book"))
    write_run(tmp_path / "c", scores(0.1), docs=DOCS)
    assert [system.label for system in board_of(tmp_path).systems] == ["genpoe K=4", "closed_book", "hf llm"]


def test_tasks_have_boards_of_their_own(tmp_path: Path) -> None:
    for task in ("t", "u"):
        write_run(tmp_path / task, scores(0.5), docs=documents(N, task=task), task=task)
    boards = compare([tmp_path], draws=50).boards
    assert [board.task for board in boards] == ["t", "u"]
    assert not any(board.group.differences for board in boards)


def test_of_duplicates_the_last_counts_and_the_others_are_named(tmp_path: Path) -> None:
    for name, second, share in (("new", 9, 0.4), ("old", 3, 0.5)):
        write_run(tmp_path / name, scores(share), docs=DOCS, second=second)
    comparison = compare([tmp_path], draws=50)
    (system,) = comparison.boards[0].systems
    assert system.estimates["em"].mean == pytest.approx(0.4)
    (entry,) = comparison.left_out
    assert (
        "/old/" in str(entry.path) and "a duplicate of" in entry.reason and "em differs on 6 questions" in entry.reason
    )


def with_arguments(**more: object) -> dict[str, object]:
    own = genpoe_facts()
    return {"genpoe": own | {"arguments": own["arguments"] | more}}


def test_an_argument_at_the_default_that_it_came_with_changes_no_run(tmp_path: Path) -> None:
    write_run(tmp_path / "before", scores(0.5), docs=DOCS, **with_arguments())
    write_run(tmp_path / "after", scores(0.5), docs=DOCS, second=3, **with_arguments(gate_temperature=1.0))
    comparison = compare([tmp_path], draws=50)
    assert len(comparison.boards[0].systems) == 1
    assert "a duplicate of" in comparison.left_out[0].reason


def test_a_label_tells_an_argument_from_its_default(tmp_path: Path) -> None:
    """Also where the settings of the other run do not have it."""
    write_run(tmp_path / "a", scores(0.8), docs=DOCS, **with_arguments())
    write_run(tmp_path / "b", scores(0.6), docs=DOCS, **with_arguments(gate_temperature=2.0))
    write_run(tmp_path / "c", scores(0.4), docs=DOCS, **with_arguments(expert_layers="5+11"))
    write_run(tmp_path / "d", scores(0.2), docs=DOCS, **facts("closed_book"))
    assert [system.label for system in board_of(tmp_path).systems] == [
        "genpoe K=4",
        "genpoe K=4 gate_temperature=2.0",
        "genpoe K=4 expert_layers=5+11",
        "closed_book",
    ]


def test_a_folder_given_twice_counts_once(tmp_path: Path) -> None:
    write_run(tmp_path / "a", scores(0.5), docs=DOCS)
    comparison = compare([tmp_path, tmp_path / "a"], draws=50)
    assert len(comparison.boards[0].systems) == 1 and not comparison.left_out


def test_seeds_are_one_row(tmp_path: Path) -> None:
    write_run(tmp_path / "r", scores(0.5), docs=DOCS, **facts())
    for seed, share in enumerate((0.1, 0.2, 0.3)):
        write_run(tmp_path / f"s{seed}", scores(share, seed), docs=DOCS, **facts("genpoe", "shuffled", 4, seed))
    retrieved, shuffled = board_of(tmp_path).systems
    assert len(shuffled.runs) == 3 and len(retrieved.runs) == 1
    assert shuffled.estimates["em"].mean == pytest.approx(0.2)
    assert shuffled.seeds["em"] == pytest.approx((0.1, 0.3))
    assert shuffled.rank is None and retrieved.rank == (1, 1)


@pytest.mark.parametrize("mode", ["genpoe", "genpoe_rag"])
@pytest.mark.parametrize(("shuffled", "flagged"), [(0.1, False), (0.7, True), (0.65, True), (None, False)])
def test_experts_without_knowledge_are_flagged(
    tmp_path: Path, mode: str, shuffled: float | None, flagged: bool
) -> None:
    write_run(tmp_path / "r", scores(0.7), docs=DOCS, **facts(mode))
    if shuffled is not None:
        write_run(tmp_path / "s", scores(shuffled, 1), docs=DOCS, **facts(mode, "shuffled"))
        write_run(tmp_path / "k", scores(0.1, 1), docs=DOCS, **facts(mode, "shuffled", 2))  # is of another run
    board = board_of(tmp_path)
    flags = {system.label: system.flag for system in board.systems}
    label = f"{mode} K=4"
    assert bool(flags.pop(label)) == flagged
    assert not any(flags.values())
    assert bool(board.systems[0].caution) == (shuffled is None)
    text = markdown(compare([tmp_path], draws=50))
    assert (NO_KNOWLEDGE in text) == flagged


@pytest.mark.parametrize(("count", "compared"), [(1, True), (2, False)])
def test_a_control_may_have_other_gates_for_a_single_passage(tmp_path: Path, count: int, compared: bool) -> None:
    for name, passages, gates in (("r", "retrieved", "uniform"), ("s", "shuffled", "softmax")):
        run = facts("genpoe", passages, count)
        run["genpoe"]["arguments"]["gates"] = gates
        write_run(tmp_path / name, scores(0.7 if name == "r" else 0.1), docs=DOCS, **run)
    assert (board_of(tmp_path).systems[0].caution is None) == compared


def test_rag_needs_no_shuffled_control(tmp_path: Path) -> None:
    write_run(tmp_path / "r", scores(0.7), docs=DOCS, **facts("rag"))
    (system,) = board_of(tmp_path).systems
    assert system.flag is None and system.caution is None


def test_pairs_are_tested_and_corrected_together(tmp_path: Path) -> None:
    shares = {"a": 0.9, "b": 0.6, "c": 0.55, "d": 0.1}
    for seed, (name, share) in enumerate(shares.items()):
        write_run(tmp_path / name, scores(share, seed), docs=DOCS, model_args={"pretrained": name})
    board = board_of(tmp_path)
    assert [system.label for system in board.systems] == ["hf a", "hf b", "hf c", "hf d"]
    assert len(board.pairs) == 6
    plain = []
    for pair in board.pairs:
        one, two = (board.systems[at].scores["em"] for at in (pair.first, pair.second))
        wins, losses = int(((one - two) > 0).sum()), int(((one - two) < 0).sum())
        assert (pair.wins, pair.losses) == (wins, losses)
        assert pair.difference == pytest.approx(one.mean() - two.mean())
        assert pair.exact == pytest.approx(stats.binomtest(wins, wins + losses).pvalue)
        plain.append(pair.mcnemar)
    assert [pair.adjusted for pair in board.pairs] == pytest.approx(list(multipletests(plain, method="holm")[1]))
    assert [system.rank for system in board.systems] == [(1, 1), (2, 3), (2, 3), (4, 4)]


def test_less_is_better_where_the_task_says_so(tmp_path: Path) -> None:
    stated = [{"metric": "em", "aggregation": "mean", "higher_is_better": False}]
    for seed, (name, share) in enumerate({"a": 0.9, "b": 0.1}.items()):
        values = scores(share, seed)
        write_run(tmp_path / name, values, docs=DOCS, model_args={"pretrained": name}, metric_list=stated)
    board = board_of(tmp_path)
    assert [(system.label, system.rank) for system in board.systems] == [("hf b", (1, 1)), ("hf a", (2, 2))]


def test_recovered_fractions_are_of_the_same_llm_and_passages(tmp_path: Path) -> None:
    """Also of gold passages, whose ceiling is RAG with gold passages; not of controls without knowledge."""
    shares = {
        "closed_book": 0.1,
        "rag": 0.6,
        "genpoe": 0.4,
        "rag gold": 0.9,
        "genpoe gold": 0.5,
        "genpoe shuffled": 0.1,
    }
    for number, (llm, shift) in enumerate({"a": 0.0, "b": 0.1}.items()):
        for seed, (which, share) in enumerate(shares.items()):
            own = {"model_args": {"pretrained": llm}, **facts(*which.split())}
            write_run(tmp_path / f"{llm}{which}", scores(share + shift, 10 * number + seed), docs=DOCS, **own)
    board = board_of(tmp_path)
    found = {
        (system.settings["pretrained"], system.settings["mode"], system.control): system.recovered
        for system in board.systems
        if system.recovered
    }
    assert set(found) == {(llm, "genpoe", control) for llm in "ab" for control in (None, "gold")}
    for (llm, _, control), recovered in found.items():
        means = {}
        for name, number in (("closed_book", recovered.closed_book), ("rag", recovered.rag)):
            system = board.systems[number - 1]
            assert (system.settings["pretrained"], system.settings["mode"]) == (llm, name)
            assert name == "closed_book" or system.control == control
            means[name] = system.scores["em"].mean()
        run = 0.5 if control else 0.4
        shift = 0.1 if llm == "b" else 0.0
        fraction = (run + shift - means["closed_book"]) / (means["rag"] - means["closed_book"])
        assert recovered.fraction == pytest.approx(fraction, abs=0.02)
        assert recovered.low < recovered.fraction < recovered.high
    text = markdown(compare([tmp_path], draws=200))
    assert f"{100 * found['a', 'genpoe', None].fraction:.1f} \\[" in text and "| oracle |" in text


@pytest.mark.parametrize(("rag", "given"), [(0.1, False), (0.13, False), (0.05, False), (0.5, True)])
def test_no_fraction_of_a_gain_that_is_not_significant(tmp_path: Path, rag: float, given: bool) -> None:
    for seed, (mode, share) in enumerate({"closed_book": 0.1, "rag": rag, "genpoe": 0.4}.items()):
        write_run(tmp_path / mode, scores(share, seed), docs=DOCS, **facts(mode))
    board = board_of(tmp_path)
    assert [bool(system.recovered) for system in board.systems if system.settings["mode"] == "genpoe"] == [given]
    assert ("recovered" in markdown(compare([tmp_path], draws=200))) == given


def test_recovered_fractions_where_less_is_better(tmp_path: Path) -> None:
    stated = [{"metric": "em", "aggregation": "mean", "higher_is_better": False}]
    for seed, (mode, share) in enumerate({"closed_book": 0.9, "rag": 0.1, "genpoe": 0.5}.items()):
        write_run(tmp_path / mode, scores(share, seed), docs=DOCS, metric_list=stated, **facts(mode))
    (recovered,) = [system.recovered for system in board_of(tmp_path).systems if system.recovered]
    assert recovered.fraction == pytest.approx(0.5) and 0.2 < recovered.low < 0.5 < recovered.high < 0.8


def test_scores_by_what_closed_book_knows(tmp_path: Path) -> None:
    values = {
        mode: scores(share, seed)["em"] for seed, (mode, share) in enumerate({"closed_book": 0.4, "rag": 0.7}.items())
    }
    for mode, em in values.items():
        write_run(tmp_path / mode, {"em": em}, docs=DOCS, **facts(mode))
    write_run(tmp_path / "b", scores(0.6, 5), docs=DOCS, model_args={"pretrained": "other"}, **facts("rag"))
    parts = {(s.settings["pretrained"], s.settings["mode"]): s.by_known for s in board_of(tmp_path).systems}
    assert parts["llm", "closed_book"] == parts["other", "rag"] == {}
    for name, right in (("known", 1.0), ("unknown", 0.0)):
        group = [rag for rag, own in zip(values["rag"], values["closed_book"], strict=True) if own == right]
        part = parts["llm", "rag"][name]
        assert (part.n, part.mean) == (len(group), pytest.approx(sum(group) / len(group)))


def test_scores_by_the_length_of_the_first_passage(tmp_path: Path) -> None:
    docs = documents(N, passages=2)
    lengths = [3 + (7 * n) % 45 for n in range(N)]
    for doc, length in zip(docs, lengths, strict=True):
        doc["ctxs"][0]["text"] = "word " * (length - 1) + "end"
    em = scores(0.6)["em"]
    write_run(tmp_path / "a", {"em": em}, docs=docs, **facts())
    (system,) = board_of(tmp_path).systems
    assert sum(part.n for part in system.by_length.values()) == N and len(system.by_length) == 3
    for name, part in system.by_length.items():
        first, last = map(int, name.split("\u2013"))
        group = [right for right, length in zip(em, lengths, strict=True) if first <= length <= last]
        assert (part.n, part.mean) == (len(group), pytest.approx(sum(group) / len(group)))
        assert 15 <= part.n <= 25


def test_costs_are_of_answering_where_that_is_known(tmp_path: Path) -> None:
    write_run(tmp_path / "a", scores(0.9), docs=DOCS, **facts())
    write_run(tmp_path / "b", scores(0.5), docs=DOCS)
    ours, theirs = (system.cost for system in board_of(tmp_path).systems)
    assert (ours.seconds, ours.whole_command, ours.peak_bytes) == (pytest.approx(0.01), False, 1 << 30)
    assert (theirs.seconds, theirs.whole_command, theirs.peak_bytes) == (pytest.approx(12.5 / N), True, None)


def test_costs_of_experts_and_of_the_first_token(tmp_path: Path) -> None:
    """Means over seeds; cells without a number stay empty."""
    for seed, first in enumerate((0.02, 0.04)):
        own = genpoe_facts("genpoe", "shuffled", 4, seed, first_token_seconds=first, expert_bytes=100 * 3 * 2**20)
        write_run(tmp_path / f"{seed}", scores(0.5), docs=DOCS, genpoe=own)
    own = genpoe_facts("rag", first_token_seconds=0.5, expert_bytes=None)
    write_run(tmp_path / "rag", scores(0.4), docs=DOCS, genpoe=own)
    write_run(tmp_path / "hf", scores(0.3), docs=DOCS)
    board = board_of(tmp_path)
    costs = {system.label: system.cost for system in board.systems}
    assert costs["genpoe shuffled K=4"].first_token == pytest.approx(0.03)
    header, rows = table(board)
    cells = {row[header.index("system")]: dict(zip(header, row, strict=True)) for row in rows}
    shown = {name: (row["first token"], row["experts/question"]) for name, row in cells.items()}
    assert shown == {"genpoe shuffled K=4": ("30 ms", "3.0 MiB"), "rag K=4": ("500 ms", ""), "hf llm": ("", "")}


def test_an_unknown_metric_is_refused_with_those_there_are(tmp_path: Path) -> None:
    write_run(tmp_path, scores(0.5), docs=DOCS)
    with pytest.raises(InputError, match="metric rouge: no run has it; the runs have em"):
        compare([tmp_path], metric="rouge")


def a_few(tmp_path: Path) -> None:
    for seed, (control, share) in enumerate({"retrieved": 0.7, "shuffled": 0.6, "gold": 0.9}.items()):
        write_run(tmp_path / control, scores(share, seed), docs=DOCS, **facts("genpoe", control))
    write_run(tmp_path / "hf", scores(0.2), docs=DOCS, model_args={"pretrained": "a<b>|c"})


def test_all_files_say_the_same(tmp_path: Path) -> None:
    a_few(tmp_path / "runs")
    comparison = compare([tmp_path / "runs"], draws=100)
    paths = write(comparison, tmp_path / "out")
    assert sorted(path.name for path in paths) == sorted(path.name for path in (tmp_path / "out").iterdir())
    (board,) = comparison.boards
    told = json.loads((tmp_path / "out" / "comparison.json").read_text())["boards"][0]

    def rows(name: str) -> list[dict[str, str]]:
        with (tmp_path / "out" / name).open(newline="") as file:
            return list(csv.DictReader(file))

    table = MarkdownIt("commonmark").enable("table").render((tmp_path / "out" / "leaderboard.md").read_text())
    for system, line, row in zip(board.systems, told["systems"], rows("leaderboard.csv"), strict=True):
        estimate = system.estimates["em"]
        assert float(row["em"]) == line["scores"]["em"]["mean"] == estimate.mean
        assert row["system"] == line["label"] == system.label
        assert f"{100 * estimate.mean:.1f} [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]" in table
        assert (row["flag"] or None) == line["flag"] == system.flag
        check_origin(system, line["runs"], row)
    assert "a&lt;b&gt;|c" in table and "<b>" not in table
    assert len(told["pairs"]) == len(rows("pairs.csv")) == len(board.pairs)
    questions = rows("questions.csv")
    assert len(questions) == N
    for number, system in enumerate(board.systems, 1):
        assert [float(line[f"#{number}"]) for line in questions] == system.scores["em"].tolist()


def check_origin(system: System, runs: list[dict], row: dict[str, str]) -> None:
    """Checkpoint, data, versions and command stand in every output."""
    (origin,) = runs
    assert origin["results"] == row["results"] == str(system.runs[0].results)
    assert origin["command"] == row["command"]
    assert len(origin["fingerprints"]["data"]) == 16
    if system.settings["kind"] == "genpoe":
        assert origin["recorded"] and origin["command"].startswith("lm_eval run --model genpoe")
        assert origin["fingerprints"]["hypernetwork"] == "hypernetwork-fingerprint"
        assert origin["versions"]["torch"] == "2.13.0"
    else:
        assert not origin["recorded"] and "--model hf --model_args 'pretrained=a<b>|c' --tasks t" in origin["command"]
