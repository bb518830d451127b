"""``real-llm table``, with an encoder that counts letters and a stand-in for lm_eval that writes synthetic results."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from scipy import stats

from benchmarks.__main__ import main
from benchmarks.real_llm import questions
from benchmarks.real_llm.layers import Shape, largest_set, named, read_heads, read_layers
from benchmarks.real_llm.measures import Paired, mean
from benchmarks.real_llm.questions import PURPOSES, file_of, find_files, purposes, sample, with_gold, write_files
from benchmarks.real_llm.results import records
from benchmarks.real_llm.rows import MEANINGS, StudyRow, study_rows
from benchmarks.real_llm.scores import paired, read_scores, tasks_of, token_counter
from benchmarks.real_size import card_of
from benchmarks.synthetic_results import write_run
from genpoe_plugin.comparison import matrix
from genpoe_plugin.data.passages import Passage
from genpoe_plugin.data.questions import Question, RetrievedPassage, read_questions
from genpoe_plugin.errors import InputError
from genpoe_plugin.retrieval.encoder_options import EncoderOptions
from genpoe_plugin.selection.pipeline import Pipeline
from genpoe_plugin.training.creation import attention_config, create_attention_experts
from tests.in_process import started_by

COUNT = 12  # questions per data set
LIMIT, CURVE, NATS = 8, 5, 4
SETS = {1: (2,), 2: (0, 2)}


class Letters:
    """Stands in for an encoder."""

    name = fingerprint = pooling = "letters"
    options = EncoderOptions("", "")
    precision = "float32"
    dimension = 26

    def _encode(self, text: str) -> np.ndarray:
        counts = Counter(text.lower())
        return np.array([counts[chr(97 + i)] for i in range(26)], np.float32) / 10

    def encode_questions(self, texts):
        return np.stack([self._encode(question) for question in texts])

    def encode_passages(self, passages):
        return np.stack([self._encode(passage.string) for passage in passages])


def passage(name: str, text: str, rank: int = 1, has_answer: bool | None = None) -> RetrievedPassage:
    return RetrievedPassage(Passage(name, name, text), 1 / rank, rank, has_answer=has_answer)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    rows, paragraphs = [], []
    for number in range(COUNT):
        name, year = f"thing {chr(97 + number) * 3}", 1900 + number
        text = f"The {name} was found in {year}."
        ctx = {"id": name, "title": name, "text": text, "score": "0", "has_answer": True}
        rows.append({"question": f"when was the {name} found", "answers": [str(year)], "ctxs": [ctx]})
        qas = [{"question": f"In which year was the {name} found?", "answers": [{"text": str(year)}]}]
        paragraphs.append({"context": text, "qas": qas})
    (folder / "nq-open-gold-passages.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "squad-v1.1-part.json").write_text(json.dumps({"data": [{"title": "things", "paragraphs": paragraphs}]}))
    return folder


@pytest.fixture
def letters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(questions, "encoder_name", lambda: "letters")
    monkeypatch.setattr(questions, "load_encoder", lambda name: Letters())


# Questions and their passages


def test_a_sample_is_the_beginning_of_a_larger_one_and_depends_on_the_seed():
    pool = [Question(f"question {number}", ("a",)) for number in range(50)]
    assert sample(pool, 10, 0) == sample(pool, 30, 0)[:10]
    assert sample(pool, 10, 0) != sample(pool, 10, 1)
    assert len({question.question for question in sample(pool, 50, 0)}) == 50


def test_each_distinct_question_has_only_its_own_passage():
    wrong, right = passage("w", "no", 1, False), passage("r", "yes", 2, True)
    items = [Question("Who?", ("yes",), (wrong, right)), Question("who", ("yes",), (right,)), Question("What", ("a",))]
    (only,) = with_gold(items)
    (gold,) = only.passages
    assert gold.passage == right.passage and gold.rank == 1 and gold.has_answer


def test_distractors_are_the_best_without_an_answer_and_not_the_own_passage():
    gold = passage("gold", "In 1900 it was.", has_answer=True)
    question = Question("when was it", ("1900",), (gold,))
    texts = ["also 1900, it says", "in 1901", "In 1900 it was.", "19000", "in 1902", "in 1903"]
    names = ["x", "b", "gold", "d", "e", "f"]
    ranked = [passage(name, text, rank) for rank, (name, text) in enumerate(zip(names, texts, strict=True), 1)]
    by_purpose = purposes(question, ranked)
    assert [entry.passage.id for entry in by_purpose["gold"].passages] == ["gold"]
    assert [entry.passage.id for entry in by_purpose["hard"].passages] == ["gold", "b", "d", "e"]
    assert [entry.passage.id for entry in by_purpose["wrong_first"].passages] == ["b", "gold", "d", "e"]
    assert [entry.passage.id for entry in by_purpose["retrieved"].passages] == ["x"]
    assert [entry.has_answer for entry in by_purpose["hard"].passages] == [True, False, False, False]
    assert by_purpose["retrieved"].passages[0].has_answer
    with pytest.raises(InputError, match="only 2 of 4"):
        purposes(question, ranked[:4])


def test_the_first_of_four_has_seven_times_the_gate_of_each_other(data, letters, tmp_path, tokenizer):
    write_files(find_files(data, []), tmp_path, LIMIT, 0)
    for purpose, right in (("hard", 0), ("wrong_first", 1)):
        items = list(read_questions(file_of(tmp_path, "nq", purpose)))
        for kind, expected in (("softmax", [0.7, 0.1, 0.1, 0.1]), ("uniform", [0.25] * 4)):
            pipeline = Pipeline(tokenizer, num_passages=4, gates=kind, progress=False)
            for selection in pipeline.select(["t"] * len(items), items):
                assert selection.gates == pytest.approx(expected)
                stated = [selection.question.answers[0] in entry.passage.text for entry in selection.passages]
                assert stated == [place == right for place in range(4)]


def test_files_of_all_purposes_have_the_same_questions_and_are_written_once(data, letters, tmp_path, monkeypatch):
    files = find_files(data, [])
    write_files(files, tmp_path, LIMIT, 0)
    for name in files:
        texts = [[one.question for one in read_questions(file_of(tmp_path, name, purpose))] for purpose in PURPOSES]
        assert len(texts[0]) == LIMIT and all(same == texts[0] for same in texts)
    monkeypatch.setattr(questions, "load_encoder", None)
    write_files(files, tmp_path, LIMIT, 0)


def test_invalid_files_of_questions_are_errors(data, letters, tmp_path):
    with pytest.raises(InputError, match="no questions; give --data"):
        find_files(None, [])
    with pytest.raises(InputError, match="--questions tqa=x: give nq=FILE or squad=FILE"):
        find_files(data, ["tqa=x"])
    assert find_files(data, ["nq=other"])["nq"] == Path("other")
    with pytest.raises(InputError, match="12 distinct questions with a passage, but --limit is 13"):
        write_files(find_files(data, []), tmp_path, COUNT + 1, 0)


# Layers and rows


def test_bytes_equal_those_of_the_llms_key_value_cache(llm_dir, make_llm):
    shape, tokens = Shape.of(str(llm_dir)), 7
    with torch.no_grad():
        cache = make_llm("llama")(torch.ones(1, tokens, dtype=torch.long), use_cache=True).past_key_values
    numbers = sum(cache.layers[layer].keys.numel() + cache.layers[layer].values.numel() for layer in (0, 2))
    assert shape.depth == 3 and shape.all == (0, 1, 2)
    assert shape.bytes((0, 2)) * tokens == 2 * numbers


def test_sets_of_layers_are_read_by_size(tmp_path):
    file = tmp_path / "layers.json"
    file.write_text('{"4": [9, 1, 2, 3], "1": [5], "3": [1, 2, 3]}')
    sets = read_layers(file, 10)
    assert sets == {1: (5,), 3: (1, 2, 3), 4: (1, 2, 3, 9)} and list(sets) == [1, 3, 4]
    assert largest_set(sets, 5) == (1, 2, 3, 9) and largest_set(sets, 3) == (1, 2, 3) and largest_set(sets, 1) == (5,)
    with pytest.raises(InputError, match="no set of at most 0 layers"):
        largest_set(sets, 0)


def test_a_calibration_has_sets_of_layers(tmp_path):
    file = tmp_path / "calibration.csv"
    rows = [
        "layers,kv_heads,nats",
        ",closed_book,3.5",
        *(" ".join(map(str, range(n))) + ",,2.0" for n in range(20, 0, -1)),
    ]
    file.write_text("\n".join(rows) + "\n")
    assert list(read_layers(file, 20)) == [1, 2, 3, 4, 5, 6, 9, 10, 12]
    file.write_text("layers,kv_heads,nats\n,closed_book,3\n0,,2\n")
    assert list(read_layers(file, 3)) == [1]
    file.write_text("layers,kv_heads,nats\n0 1,0+1 1,2.0\n")
    with pytest.raises(InputError, match="a calibration of heads"):
        read_layers(file, 20)
    file.write_text("nats\n2.0\n")
    with pytest.raises(InputError, match="neither JSON nor a calibration"):
        read_layers(file, 20)


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"2": [1]}', '{"1": [10]}', '{"2": [1, 1]}', '{"1": 3}', '{"1": [true]}']
)
def test_an_invalid_set_of_layers_is_an_error(tmp_path, text):
    file = tmp_path / "layers.json"
    file.write_text(text)
    with pytest.raises(InputError, match="give"):
        read_layers(file, 10)


def test_every_row_has_a_meaning_and_is_compared_with_existing_rows():
    heads = Path("heads"), (0, 1), ((0,), (0, 1))
    rows = study_rows({1: (2,), 2: (0, 2), 3: (0, 1, 2), 4: (0, 1, 2, 3)}, (0, 2), (2,), (0, 1, 2, 3), heads)
    names = [row.name for row in rows]
    assert len(set(names)) == len(names) and names[:3] == ["closed_book", "rag", "genpoe"]
    assert {name for row in rows for name in row.against} <= set(names)
    assert {"layers_N" if name.startswith("layers_") else name for name in names} == set(MEANINGS)
    assert [name for name in names if name.startswith("layers_")] == ["layers_3"]
    assert [row.name for row in rows if row.reads_gold] == [
        "genpoe",
        "genpoe_quarter",
        "genpoe_heads",
        "genpoe_all_layers",
        "layers_3",
    ]
    assert [(row.checkpoint, row.layers, row.heads) for row in rows if row.heads] == [heads]
    assert all(row.layers == (0, 2) for row in rows if row.mode.startswith("genpoe") and row.passages != "retrieved")


@pytest.fixture
def heads_checkpoint(make_llm, tokenizer, tmp_path) -> Path:
    """A checkpoint of experts in two layers, in the first of them with one of two key-value heads."""
    llm = make_llm("llama")
    config = replace(attention_config(llm, (0, 2)), kv_heads=((1,), (0, 1)))
    create_attention_experts(tmp_path / "heads", config, llm, tokenizer, None, card_of(tmp_path / "heads"))
    return tmp_path / "heads"


def test_heads_are_read_from_the_checkpoint(heads_checkpoint, make_llm, tokenizer, llm_dir, tmp_path):
    layers, heads = read_heads(heads_checkpoint)
    assert (layers, heads) == ((0, 2), ((1,), (0, 1))) and named(layers, heads) == "0:1 2:0+1"
    shape = Shape.of(str(llm_dir))
    assert shape.bytes(layers, heads) == 3 * shape.bytes((0,)) / 2
    llm = make_llm("llama")
    create_attention_experts(tmp_path / "all", attention_config(llm), llm, tokenizer, None, card_of(tmp_path / "all"))
    with pytest.raises(InputError, match="has all heads of its layers; create it with --heads"):
        read_heads(tmp_path / "all")


# Scores and measures


def write_results(folder: Path, task: str, docs: list[dict], value, second: int) -> None:
    """Write the results of a task in lm_eval's format; a score is ``value`` of the doc's number."""
    nats = task.endswith("_nats")
    numbers = range(len(docs))
    found = {name: [value(number) for number in numbers] for name in (("nats",) if nats else ("em", "f1", "contains"))}
    results = write_run(folder, found, docs=docs, task=task, second=second)
    samples = next(results.parent.glob(f"samples_{task}_*.jsonl"))
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    for line in lines if nats else ():
        target = f" {line['doc']['answers'][0]}"
        line["arguments"] = {"gen_args_0": {"arg_0": "Question: What?\nAnswer:", "arg_1": target}}
        line["filtered_resps"] = [[str(-value(line["doc_id"])), "False"]]
    samples.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_scores_are_in_the_order_of_the_file_and_nats_are_per_token(tmp_path, tokenizer):
    docs = [{"question": f"q{number}", "answers": ["Rossini" * (1 + number)]} for number in range(4)]
    folders = [tmp_path / "answers", tmp_path / "likelihood"]
    write_results(folders[0], *tasks_of(["nq"], ""), docs, lambda number: number % 2, 0)
    write_results(folders[1], *tasks_of(["nq"], "_nats"), docs, lambda number: 2.0 + number, 1)
    scores = read_scores(folders, ["nq"], token_counter(tokenizer))["nq"]
    tokens = [len(tokenizer.tokenize(f" {doc['answers'][0]}")) for doc in docs]
    assert len(set(tokens)) > 1
    assert scores["em"].tolist() == [0, 1, 0, 1]
    assert scores["nats"].tolist() == pytest.approx([(2 + number) / tokens[number] for number in range(4)])
    with pytest.raises(InputError, match="no results of genpoe_squad"):
        read_scores(folders, ["nq", "squad"], token_counter(tokenizer))


def test_pairs_cover_the_common_questions_of_each_data_set():
    def scores(first: int, second: int, factor: float):
        return {"nq": {"f1": factor * np.arange(first)}, "squad": {"f1": factor * (100 + np.arange(second))}}

    columns = paired([scores(4, 3, 1.0), scores(2, 3, 2.0)], ["nq", "squad"], ["f1"])
    assert columns.tolist() == [[0, 0], [1, 2], [100, 200], [101, 202], [102, 204]]
    assert len(paired([scores(4, 3, 1.0)], ["nq", "squad"], ["f1"], max_questions=2)) == 4


@pytest.fixture(scope="module")
def columns() -> np.ndarray:
    """Scores of closed-book answering, prompt and experts, which recover about four fifths."""
    rng = np.random.default_rng(5)
    hard = rng.normal(size=(600, 1))
    return hard + np.array([4.0, 2.0, 2.4]) + 0.5 * rng.normal(size=(600, 3))


def test_means_have_wilsons_or_students_interval(columns):
    right = (columns[:, 0] > 4).astype(float)
    exact = stats.binomtest(int(right.sum()), len(right)).proportion_ci(method="wilson")
    found = mean(right, share=True)
    assert (found.value, found.low, found.high) == pytest.approx((right.mean(), exact.low, exact.high))
    student = stats.t.interval(0.95, 599, columns[:, 0].mean(), stats.sem(columns[:, 0]))
    found = mean(columns[:, 0], share=False)
    assert (found.low, found.high) == pytest.approx(student)


def test_differences_are_paired(columns):
    found = Paired(columns).difference(2, 0)
    gaps = columns[:, 2] - columns[:, 0]
    assert found.value == pytest.approx(gaps.mean())
    assert (found.low, found.high) == pytest.approx(stats.t.interval(0.95, 599, gaps.mean(), stats.sem(gaps)), abs=0.01)


def test_the_recovered_fraction_has_fiellers_interval(columns):
    experts, prompt = columns[:, 2] - columns[:, 0], columns[:, 1] - columns[:, 0]
    found = Paired(columns).recovered(2, 0, 1)
    assert found is not None and found.value == pytest.approx(experts.mean() / prompt.mean())
    # All fractions s for which the mean of experts - s * prompt may be 0.
    shares = np.linspace(0.5, 1.1, 6001)
    gaps = experts - shares[:, None] * prompt
    possible = shares[np.abs(gaps.mean(1)) <= stats.t.ppf(0.975, 599) * stats.sem(gaps, axis=1)]
    assert (found.low, found.high) == pytest.approx((possible.min(), possible.max()), abs=0.01)


def test_no_recovered_fraction_if_the_prompt_may_gain_nothing(columns):
    same = np.stack([columns[:, 0], columns[::-1, 0], columns[:, 2]], axis=1)
    assert Paired(same).recovered(2, 0, 1) is None


def test_records_leave_out_comparisons_with_missing_rows():
    rng = np.random.default_rng(0)
    scores = {"nq": {name: rng.random(9) for name in ("em", "f1", "contains", "nats")}}
    rows = [StudyRow("closed_book", "closed_book", against=()), StudyRow("rag", "rag", against=("closed_book", "x"))]
    only = records(rows, {"rag": scores}, ["nq"])
    assert [(record["row"], record["questions"], record["n"]) for record in only] == [("rag", "nq", 9)]
    assert only[0]["differences"] == {} and "recovered" not in only[0]


# The command


class LmEval:
    """Stands in for the commands of a study: writes results that depend on the mode, and counts runs."""

    def __init__(self) -> None:
        self.runs: list[str] = []
        self.created: list[str] = []
        self.fails: set[str] = set()
        self.interrupts: set[str] = set()

    def __call__(self, command, **_):
        words = command[2:]
        if words[0] == "train_cli":
            assert "--layers" not in words
            self.created.append("all")
            Path(words[words.index("--out") + 1]).mkdir(parents=True)
            return SimpleNamespace(returncode=0)
        options = dict(pairwise(words))
        folder = Path(options["--output_path"])
        self.runs.append(folder.name)
        if folder.name in self.fails:
            return SimpleNamespace(returncode=1)
        arguments = dict(pair.split("=", 1) for pair in options["--model_args"].split(","))
        for second, task in enumerate(options["--tasks"].split(",")):
            file = json.loads(options["--metadata"])["genpoe_data"][task.removesuffix("_nats")]
            items = list(read_questions(file))[: int(options["--limit"])]
            docs = [{"question": one.question, "answers": list(one.answers)} for one in items]
            write_results(folder, task, docs, self.value(task, arguments), second)
            if folder.name in self.interrupts:
                next(folder.rglob("samples_*")).unlink()  # samples are written after the results
                raise KeyboardInterrupt
        return SimpleNamespace(returncode=0)

    @property
    def rows(self) -> list[str]:
        return [run for run in self.runs if not run.endswith("_nats")]

    @staticmethod
    def value(task: str, arguments):
        wrong = arguments["mode"] == "closed_book" or arguments.get("passages") in ("shuffled", "none")
        if task.endswith("_nats"):
            return lambda number: (8.0 if wrong else 2.0 if arguments["mode"] == "rag" else 3.5) + number % 2
        return lambda number: 0.0 if wrong else float(arguments["mode"] == "rag" or number % 4 > 0)


@pytest.fixture
def lm_eval(monkeypatch) -> LmEval:
    stand_in = LmEval()
    monkeypatch.setattr(subprocess, "run", stand_in)
    monkeypatch.setattr(subprocess, "Popen", started_by(stand_in))
    monkeypatch.setattr(matrix, "checkpoint_fingerprint", str)
    return stand_in


@pytest.fixture
def run(data, letters, lm_eval, llm_dir, tmp_path):
    """``run(*more)``: runs the command and returns its result."""
    layers = tmp_path / "layers.json"
    layers.write_text(json.dumps({size: list(layers) for size, layers in SETS.items()}))

    def command(*more: str):
        words = [
            "real-llm",
            "table",
            "--llm",
            llm_dir,
            "--layers-file",
            layers,
            "--data",
            data,
            "--out",
            tmp_path / "study",
        ]
        words += ["--limit", LIMIT, "--limit-curve", CURVE, "--limit-nats", NATS, *more]
        return CliRunner().invoke(main, list(map(str, words)))

    return command


def test_a_whole_study_with_its_report(run, lm_eval, llm_dir, tmp_path):
    out = tmp_path / "study"
    assert run("--rows", "rag,closed_book").exit_code == 0
    assert lm_eval.rows == ["rag", "closed_book"] and not lm_eval.created
    assert run().exit_code == 0
    assert len(lm_eval.rows) == len(set(lm_eval.rows)) == 17
    assert lm_eval.created == ["all"]
    again = run()
    assert again.exit_code == 0 and len(lm_eval.rows) == 17, again.output

    study = json.loads((out / "table.json").read_text())
    assert study["layers"] == [2]
    found = {(record["row"], record["questions"]): record for record in study["records"]}
    assert found["genpoe", "both"]["n"] == 2 * LIMIT and found["layers_2", "squad"]["n"] == CURVE
    assert found["genpoe", "both"]["n_nats"] == 2 * NATS
    # Experts answer 6 of 8 questions (all but the multiples of 4), closed-book answers none, and the prompt all.
    assert found["genpoe", "nq"]["recovered"]["f1"]["value"] == pytest.approx(6 / 8)
    assert found["genpoe", "nq"]["recovered"]["nats"]["value"] == pytest.approx((3.5 - 8) / (2 - 8))
    assert found["layers_2", "nq"]["recovered"]["f1"]["value"] == pytest.approx(3 / 5)
    assert found["genpoe_shuffled", "both"]["differences"]["closed_book"]["f1"]["value"] == 0
    assert found["genpoe_four", "both"]["differences"]["rag_four"]["n"] == 2 * CURVE
    assert [(point["row"], point["number"], point["n"]) for point in study["curve"]] == [
        ("genpoe", 1, 2 * CURVE),
        ("layers_2", 2, 2 * CURVE),
        ("genpoe_all_layers", 3, 2 * CURVE),
    ]
    assert study["curve"][0]["recovered"]["f1"]["value"] == pytest.approx(3 / 5)
    with (out / "table.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 3 * 17 and all(line["em_value"] for line in lines)

    report = CliRunner().invoke(main, ["real-llm", "report", str(out), "--out", str(tmp_path / "docs" / "REAL.md")])
    assert report.exit_code == 0, report.output
    text = (tmp_path / "docs" / "REAL.md").read_text()
    assert f"## {llm_dir.name}" in text and "| genpoe | 2 | 16 | 75.0 (" in text and str(tmp_path) not in text
    for kind in ("layers", "bytes"):
        picture = f"real/{llm_dir.name}-{kind}.png"
        assert f"]({picture})" in text and (tmp_path / "docs" / picture).read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_row_runs_again_and_others_run_when_one_fails(run, lm_eval, tmp_path):
    lm_eval.interrupts = {"rag"}
    assert run("--rows", "closed_book,rag").exit_code == 130
    assert list((tmp_path / "study" / "rows" / "rag").rglob("results_*.json"))
    lm_eval.interrupts, lm_eval.fails = set(), {"genpoe"}
    failed = run("--rows", "genpoe,rag")
    assert failed.exit_code == 2 and "failed: genpoe; rerun the same command to resume" in failed.output
    assert lm_eval.rows == ["closed_book", "rag", "genpoe", "rag"]
    study = json.loads((tmp_path / "study" / "table.json").read_text())
    assert {record["row"] for record in study["records"]} == {"closed_book", "rag"}


def test_the_command_of_a_row(run, lm_eval, tmp_path, llm_dir):
    assert run("--rows", "genpoe_four_equal", "--dtype", "float32").exit_code == 0
    command = json.loads((tmp_path / "study" / "rows" / "genpoe_four_equal" / "cell.json").read_text())["command"]
    options = dict(zip(command[1::2], command[2::2], strict=False))
    arguments = dict(pair.split("=", 1) for pair in options["--model_args"].split(","))
    study = tmp_path / "study"
    assert arguments.pop("trace") and arguments == {
        "pretrained": str(llm_dir),
        "dtype": "float32",
        "mode": "genpoe",
        "seed": "0",
        "passages": "retrieved",
        "num_passages": "4",
        "gates": "uniform",
        "hypernetwork": str(study / "checkpoint"),
        "expert_layers": "2",
        "expert_store": str(study / "experts"),
        "expert_gb": "2.0",
    }
    assert options["--tasks"] == "genpoe_nq,genpoe_squad"
    assert options["--limit"] == str(CURVE) and options["--gen_kwargs"] == "max_gen_toks=16"
    assert json.loads(options["--metadata"])["genpoe_data"]["genpoe_nq"] == str(study / "questions" / "nq-hard.jsonl")
    likelihood = json.loads((study / "rows" / "genpoe_four_equal_nats" / "cell.json").read_text())["command"]
    options = dict(zip(likelihood[1::2], likelihood[2::2], strict=False))
    assert options["--tasks"] == "genpoe_nq_nats,genpoe_squad_nats" and options["--limit"] == str(NATS)
    assert "--gen_kwargs" not in options


def command_of(study: Path, run: str) -> tuple[dict[str, str], dict[str, str]]:
    """The options of an lm_eval run, and its model arguments."""
    command = json.loads((study / "rows" / run / "cell.json").read_text())["command"]
    options = dict(zip(command[1::2], command[2::2], strict=False))
    return options, dict(pair.split("=", 1) for pair in options["--model_args"].split(","))


def test_the_row_with_selected_heads_uses_their_checkpoint(run, heads_checkpoint, tmp_path):
    assert run("--rows", "genpoe_heads", "--heads", str(heads_checkpoint), "--no-store").exit_code == 0
    _, arguments = command_of(tmp_path / "study", "genpoe_heads")
    assert arguments["hypernetwork"] == str(heads_checkpoint)
    assert not {"expert_layers", "expert_store"} & arguments.keys()
    study = json.loads((tmp_path / "study" / "table.json").read_text())
    assert {record["layers"] for record in study["records"]} == {"0:1 2:0+1"}
    assert "--heads heads" in study["command"]


def test_likelihoods_with_passages_in_the_prompt_use_small_batches(run, tmp_path):
    assert run("--rows", "closed_book,rag", "--limit-nats", str(LIMIT), "--batch-size", "32").exit_code == 0
    both, _ = command_of(tmp_path / "study", "closed_book")
    assert both["--tasks"] == "genpoe_nq,genpoe_squad,genpoe_nq_nats,genpoe_squad_nats"
    answers, _ = command_of(tmp_path / "study", "rag")
    nats, _ = command_of(tmp_path / "study", "rag_nats")
    assert (answers["--tasks"], answers["--batch_size"]) == ("genpoe_nq,genpoe_squad", "32")
    assert (nats["--tasks"], nats["--batch_size"]) == ("genpoe_nq_nats,genpoe_squad_nats", "8")
    assert answers["--limit"] == nats["--limit"] == str(LIMIT)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--rows", "genpoe,other"], "--rows other: not one of closed_book, rag"),
        (["--limit-curve", "9"], "--limit-curve 9: more than --limit 8"),
        (["--limit-nats", "9"], "--limit-nats 9: more than --limit 8"),
    ],
)
def test_bad_input_is_one_line(run, more, message):
    result = run(*more)
    assert result.exit_code == 2 and message in result.output and result.output.count("\n") == 1


def test_a_folder_has_one_study(run, tmp_path):
    assert run("--rows", "closed_book").exit_code == 0
    other = run("--rows", "closed_book", "--max-tokens", "9")
    assert other.exit_code == 2 and "has a study with max_tokens 16, not 9; give another --out" in other.output
    nothing = CliRunner().invoke(main, ["real-llm", "report", str(tmp_path), "--out", str(tmp_path / "REAL.md")])
    assert nothing.exit_code == 2 and "no study (table.json cannot be read)" in nothing.output


def test_commands_are_imported_lazily():
    script = "import sys, benchmarks.__main__; print('benchmarks.real_llm.table' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
