"""The demo from world to table, so small that nothing is learned, and what each stage left checked by hand."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import lm_eval._cli
import pytest

from genpoe_plugin.arguments import GenPoEArguments
from genpoe_plugin.checkpoints.checkpoint import is_checkpoint
from genpoe_plugin.comparison import matrix as matrix_module
from genpoe_plugin.comparison.leaderboard import compare
from genpoe_plugin.comparison.matrix import read_matrix, write_matrix
from genpoe_plugin.comparison.origin import origin_of
from genpoe_plugin.data.answers import exact_match, f1
from genpoe_plugin.data.questions import read_questions
from genpoe_plugin.demo import world_demo
from genpoe_plugin.demo.world import make_world, side_of
from genpoe_plugin.demo.world_demo import DemoResult, DemoSettings, matrix_file, run_demo, table_cells
from genpoe_plugin.demo.world_table import Row
from genpoe_plugin.errors import InputError
from tests.in_process import InProcess

SETTINGS = DemoSettings(seed=1, train_entities=12, test_entities=4, reranker_steps=2, hypernetwork_steps=3)
WORLD = make_world(1, 12, 4)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, DemoResult, InProcess]]:
    out = tmp_path_factory.mktemp("demo") / "out"
    process = InProcess()
    with patch.object(world_demo, "subprocess", process), patch.object(matrix_module, "subprocess", process):
        yield out, run_demo(out, SETTINGS), process


@pytest.fixture(scope="module")
def demo(result: tuple[Path, DemoResult, InProcess]) -> tuple[Path, list[Row], InProcess]:
    out, shown, process = result
    return out, shown.rows, process


def results_directory(out: Path, mode: str, passages: str) -> Path:
    """Where the lm_eval run of a row wrote."""
    matrix = read_matrix(matrix_file(out))
    return matrix.folder(table_cells(matrix, SETTINGS.seed)[world_demo.RUNS.index((mode, passages))])


def exact_matches(out: Path, mode: str, passages: str) -> list[bool]:
    return [record["em"] == 1.0 for record in samples(out, mode, passages)]


def samples(out: Path, mode: str, passages: str) -> list[dict[str, Any]]:
    """lm_eval's own record of every question of a run."""
    (path,) = results_directory(out, mode, passages).rglob("samples_*.jsonl")
    return sorted(map(json.loads, path.read_text().splitlines()), key=lambda record: record["doc_id"])


def traces(out: Path, mode: str, passages: str) -> list[list[str]]:
    """The ids of the passages that each question of a run was answered with."""
    lines = (results_directory(out, mode, passages) / "trace.jsonl").read_text().splitlines()
    return [[passage["id"] for passage in json.loads(line)["passages"]] for line in lines]


def test_the_table_has_a_row_for_every_mode_and_control(demo):
    out, rows, _ = demo
    assert [(row.mode, row.passages) for row in rows] == list(world_demo.RUNS)
    assert {row.mode for row in rows} == {"closed_book", "rag", "genpoe", "genpoe_rag"}
    assert {row.passages for row in rows} == {"retrieved", "gold", "shuffled", "random", "constant", "none"}
    assert json.loads((out / "table.json").read_text()) == [asdict(row) for row in rows]


def test_scores_are_those_of_the_answers_that_lm_eval_logged(demo):
    out, rows, _ = demo
    asked = WORLD.questions["test"]
    for row in rows:
        records = samples(out, row.mode, row.passages)
        assert row.n == len(records) == len(asked) == 16
        answers = [record["resps"][0][0].split("\n")[0] for record in records]
        matches = [exact_match(answer, question.answers) for answer, question in zip(answers, asked, strict=True)]
        overlaps = [f1(answer, question.answers) for answer, question in zip(answers, asked, strict=True)]
        assert row.em == pytest.approx(sum(matches) / 16)
        assert row.f1 == pytest.approx(sum(overlaps) / 16)
        assert exact_matches(out, row.mode, row.passages) == [match == 1 for match in matches]


def test_recall_is_of_the_passage_that_the_world_made_for_the_question(demo):
    out, rows, _ = demo
    found = list(read_questions(out / "test.jsonl"))
    firsts = defaultdict(list)
    for asked, question in zip(WORLD.questions["test"], found, strict=True):
        assert question.question == asked.question
        for place in ("rank", "rerank_rank"):
            places = [getattr(item, place) for item in question.passages if item.passage.id == asked.passage_id]
            firsts[place].append(min(places, default=99))
    for row in rows:
        recall = (
            row.recall_at_1,
            row.recall_at_5,
            row.recall_at_20,
            row.reranked_recall_at_1,
            row.reranked_recall_at_5,
        )
        expected = [sum(p <= k for p in firsts["rank"]) / 16 for k in (1, 5, 20)]
        expected += [sum(p <= k for p in firsts["rerank_rank"]) / 16 for k in (1, 5)]
        assert recall == ((None,) * 5 if row.passages in ("none", "random", "constant") else tuple(expected))


def test_em_with_the_own_passage_at_hand_is_over_the_questions_that_had_it(demo):
    out, rows, _ = demo
    own = [question.passage_id for question in WORLD.questions["test"]]
    for row in rows:
        given = traces(out, row.mode, row.passages)
        matches = exact_matches(out, row.mode, row.passages)
        had = [match for match, passage, ids in zip(matches, own, given, strict=True) if passage in ids]
        expected = sum(had) / len(had) if had and row.passages == "retrieved" else None
        assert row.em_gold_present == expected


def test_every_row_was_answered_with_the_passages_that_it_is_named_after(demo):
    out, _, _ = demo
    own = [question.passage_id for question in WORLD.questions["test"]]
    best = [[item.passage.id for item in question.passages[:4]] for question in read_questions(out / "test.jsonl")]
    for mode in ("rag", "genpoe", "genpoe_rag"):
        assert traces(out, mode, "retrieved") == best
    assert traces(out, "genpoe", "gold") == [[passage] for passage in own]
    shuffled, drawn = traces(out, "genpoe", "shuffled"), traces(out, "genpoe", "random")
    assert all(row in best[:n] + best[n + 1 :] for n, row in enumerate(shuffled)) and shuffled != best
    assert all(len(row) == 4 and passage not in row for passage, row in zip(own, drawn, strict=True))
    (constant,) = {tuple(row) for row in traces(out, "genpoe", "constant")}
    assert len(constant) == 1
    assert not any(traces(out, "genpoe", "none") + traces(out, "closed_book", "none"))


def test_without_passages_genpoe_says_what_the_llm_says(demo):
    out, _, _ = demo
    closed, none = samples(out, "closed_book", "none"), samples(out, "genpoe", "none")
    assert [record["resps"] for record in none] == [record["resps"] for record in closed]
    rag = samples(out, "rag", "retrieved")
    assert [record["resps"] for record in rag] != [record["resps"] for record in closed]


def test_training_asks_about_the_train_side_only(demo):
    out, _, _ = demo
    passages = {passage.id: passage for passage in WORLD.passages}
    asked = {question.question: question for question in WORLD.questions["train"]}
    assert all(side_of(question.entity) == "train" for question in asked.values())
    assert {question.question for question in read_questions(out / "train.jsonl")} == set(asked)
    records = [json.loads(line) for line in (out / "reranker.jsonl").read_text().splitlines()]
    assert {record["query"] for record in records} == set(asked)
    for record in records:
        assert record["pos"] == [passages[asked[record["query"]].passage_id].string]
        assert record["neg"] and set(record["neg"]) <= {passage.string for passage in WORLD.passages} - {*record["pos"]}
        assert record["prompt"] == world_demo.RERANKER_PROMPT
    assert is_checkpoint(out / "hypernetwork")
    assert len((out / "hypernetwork" / "loss.csv").read_text().splitlines()) == 1 + SETTINGS.hypernetwork_steps
    training = json.loads((out / "reranker" / "training.json").read_text())
    assert len(training["losses"]) == SETTINGS.reranker_steps


def test_only_what_is_missing_is_done_again(demo):
    out, rows, process = demo
    written = ("table.json", "matrix.yaml")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name not in written}
    trained, evaluated = process.commands["train_cli"], process.commands["lm_eval"]
    assert run_demo(out, SETTINGS).rows == rows
    assert (len(trained), len(evaluated)) == (2, len(world_demo.RUNS))
    (result,) = results_directory(out, "genpoe", "gold").rglob("results_*.json")
    result.unlink()
    again = run_demo(out, SETTINGS).rows
    assert (len(trained), len(evaluated)) == (2, len(world_demo.RUNS) + 1)
    assert "passages=gold" in str(evaluated[-1])
    assert [(row.mode, row.passages, row.em, row.f1) for row in again] == [
        (row.mode, row.passages, row.em, row.f1) for row in rows
    ]
    gold = results_directory(out, "genpoe", "gold")
    kept = {path: time for path, time in before.items() if gold not in path.parents}
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_other_settings_are_refused_and_leave_the_folder_alone(demo):
    out, _, _ = demo
    files = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with pytest.raises(InputError, match="made with another seed, test_entities; choose another --out") as error:
        run_demo(out, DemoSettings(**{**asdict(SETTINGS), "seed": 2, "test_entities": 5}))
    assert str(out) in str(error.value) and "\n" not in str(error.value)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == files


def test_training_that_fails_stops_the_demo(tmp_path, monkeypatch):
    monkeypatch.setattr(world_demo, "subprocess", SimpleNamespace(run=lambda *_, **__: SimpleNamespace(returncode=2)))
    with pytest.raises(InputError, match="training the hypernetwork failed; see its message above"):
        world_demo._train_hypernetwork(tmp_path, SETTINGS)


@pytest.mark.parametrize(("mode", "passages"), world_demo.RUNS)
def test_the_command_is_one_that_lm_eval_takes(tmp_path, mode, passages):
    """As its own parser reads it, and with arguments that the model class takes."""
    matrix = write_matrix(matrix_file(tmp_path), world_demo._matrix(tmp_path, SETTINGS))
    cell = table_cells(matrix, SETTINGS.seed)[world_demo.RUNS.index((mode, passages))]
    with patch.object(sys, "argv", matrix.command(cell)):
        options: argparse.Namespace = lm_eval._cli.HarnessCLI().parse_args()
    assert (options.model, options.tasks, options.batch_size) == ("genpoe", ["genpoe_demo"], "48")
    assert options.metadata == {"genpoe_data": str(tmp_path / "test.jsonl")}
    assert options.output_path == str(matrix.folder(cell)) and options.log_samples
    arguments = options.model_args
    assert Path(arguments.pop("pretrained"), "model.safetensors").is_file()
    assert arguments.pop("dtype") == "float32"
    checked = GenPoEArguments(**arguments)
    assert (checked.mode, checked.passages, checked.num_passages) == (mode, passages, 4)
    assert checked.seed == (1 if passages in ("shuffled", "random", "constant") else 0)
    assert checked.hypernetwork == (str(tmp_path / "hypernetwork") if mode.startswith("genpoe") else None)


def test_its_results_make_a_leaderboard(demo: tuple[Path, list[Row], InProcess]) -> None:
    """What lm_eval and the genpoe model really write is what `genpoe compare` reads."""
    out, rows, _ = demo
    comparison = compare([out / "leaderboard"], draws=50)
    assert not comparison.left_out and not comparison.notes
    (board,) = comparison.boards
    found = {(s.settings["mode"], s.settings["passages"]): s for s in board.systems}
    assert len(found) == len(rows)
    for row in rows:
        system = found[row.mode, row.passages]
        assert system.estimates["em"].mean == pytest.approx(row.em) and system.estimates["f1"].mean == pytest.approx(
            row.f1
        )
        (origin,) = map(origin_of, system.runs)
        assert origin.recorded and "--tasks genpoe_demo" in origin.command and f"mode={row.mode}" in origin.command
        assert origin.fingerprints["data"] and origin.versions["lm-eval"] and origin.device
        assert ("hypernetwork" in origin.fingerprints) == row.mode.startswith("genpoe")
        assert system.cost.seconds and not system.cost.whole_command and system.cost.peak_bytes
        if row.passages == "gold":
            assert "absent" not in system.by_given
    assert len({origin_of(system.runs[0]).fingerprints["data"] for system in board.systems}) == 1


def test_the_p_value_is_that_of_the_questions_that_only_one_run_answered(result):
    """As is the command that of the genpoe row."""
    out, shown, _ = result
    first, second = (exact_matches(out, mode, "retrieved") for mode in ("genpoe_rag", "rag"))
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    n = only_first + only_second
    splits = [abs(2 * sum(way) - n) >= abs(only_first - only_second) for way in product((0, 1), repeat=n)]
    assert shown.p_value == pytest.approx(sum(splits) / len(splits))
    matrix = read_matrix(matrix_file(out))
    cell = table_cells(matrix, SETTINGS.seed)[world_demo.RUNS.index(("genpoe", "retrieved"))]
    program, *words = matrix.command(cell)
    assert shlex.split(shown.command) == [program, "run", *words]


def test_its_matrix_has_every_cell(demo: tuple[Path, list[Row], InProcess]) -> None:
    out, _, _ = demo
    matrix = read_matrix(matrix_file(out))
    modes = Counter(cell.arguments.get("mode", cell.kind) for cell in matrix.cells)
    assert modes == {"closed_book": 1, "hf": 1, "rag": 28, "genpoe": 28, "genpoe_rag": 28}
    assert matrix.out == out / "leaderboard"
    cell = next(cell for cell in matrix.cells if cell.arguments.get("mode") == "genpoe")
    assert Path(cell.arguments["pretrained"]).is_dir() and is_checkpoint(Path(cell.arguments["hypernetwork"]))
    assert Path(matrix.options["metadata"]["genpoe_data"]).is_file()
