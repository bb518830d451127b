"""``genpoe experts create`` through the command line."""

from __future__ import annotations

import csv
import hashlib
import json
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from transformers import AutoModelForCausalLM

from genpoe_plugin.checkpoints.checkpoint import load_hypernetwork, read_record
from genpoe_plugin.training.calibration import AnswerLoss
from genpoe_plugin.training.creation import attention_config
from train_cli.experts import create
from train_cli.main import main

FACTS = [
    ("who wrote the opera", "Gioachino Rossini", "Rossini: the opera is by Gioachino Rossini."),
    ("where is it", "Canberra", "The capital is Canberra."),
    ("what did she discover", "radium", "Marie Curie discovered radium."),
]


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    rows = [
        {"question": question, "answers": [answer], "ctxs": [{"id": "1", "title": "T", "text": text}]}
        for question, answer, text in FACTS
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(llm: Path, out: Path, *options: object) -> Result:
    arguments = ["--llm", llm, "--out", out, *options]
    return CliRunner().invoke(main, ["experts", "create", *map(str, arguments)])


def test_experts_in_all_layers(llm_dir: Path, tokenizer, tmp_path: Path) -> None:
    result = run(llm_dir, tmp_path / "out")
    assert result.exit_code == 0, result.output
    # Three layers, two KV heads of width 8, keys and values, float32.
    assert result.stdout == f"{tmp_path / 'out'}: experts in 3 layers (0,1,2), 384 bytes per passage token\n"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors", "README.md"}
    model = AutoModelForCausalLM.from_pretrained(llm_dir)
    loaded = load_hypernetwork(tmp_path / "out", model, tokenizer)
    assert loaded.config == attention_config(model) and loaded.config.layers == (0, 1, 2)
    assert not any(parameter.any() for parameter in loaded.parameters()), "untrained"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_layers_by_name_and_a_checkpoint_is_replaced(llm_dir: Path, tokenizer, tmp_path: Path) -> None:
    for named, layers in (("2,0,2", (0, 2)), ("1", (1,))):
        result = run(llm_dir, tmp_path / "out", "--layers", named, "--dtype", "bfloat16")
        assert result.exit_code == 0, result.output
        size = 2 * 2 * 8 * 2 * len(layers)
        assert f"experts in {len(layers)} layers ({','.join(map(str, layers))}), {size} bytes" in result.stdout
        loaded = load_hypernetwork(tmp_path / "out", AutoModelForCausalLM.from_pretrained(llm_dir), tokenizer)
        assert loaded.config.layers == layers and loaded.head.bias.shape == (len(layers), 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--layers", "0,3"), "layer 3 is not in LlamaForCausalLM, which has layers 0 to 2"),
        (("--layers", "-1"), "layer -1 is not in LlamaForCausalLM"),
        (("--layers", "one"), "'one' is not a list of layers such as 5,11,12"),
        (("--layers", ""), "is not a list of layers"),
        (("--layers", "0", "--calibrate", "QUESTIONS", "--keep", "0.9"), "leave out --layers or --calibrate"),
        (("--max-layers", "2"), "need --calibrate QUESTIONS"),
        (("--max-bytes", "2KB"), "need --calibrate QUESTIONS"),
        (("--keep", "0.9"), "need --calibrate QUESTIONS"),
        (("--heads",), "need --calibrate QUESTIONS"),
        (("--calibrate", "QUESTIONS"), "--calibrate needs --max-layers, --max-bytes or --keep"),
        (("--calibrate", "QUESTIONS", "--heads"), "--calibrate needs --max-layers, --max-bytes or --keep"),
        (("--calibrate", "QUESTIONS", "--keep", "0"), "--keep"),
        (("--calibrate", "QUESTIONS", "--keep", "1.5"), "--keep"),
        (("--calibrate", "QUESTIONS", "--max-layers", "0"), "--max-layers"),
        (("--calibrate", "QUESTIONS", "--max-bytes", "much"), "'much' is not a size such as 16GB"),
        (("--calibrate", "/no/such/file", "--max-layers", "1"), "/no/such/file: no such file"),
        (("--calibrate", "WITHOUT", "--max-layers", "1"), "no question has a passage that contains one of its answers"),
        (
            ("--calibrate", "QUESTIONS", "--calibrate", "WITHOUT", "--max-layers", "1"),
            "without.jsonl: no question has a passage that contains one of its answers",
        ),
        (("--dtype", "float31"), "dtype float31: no such dtype"),
        (("--device", "gpu7"), "gpu7"),
    ],
)
def test_what_cannot_be_is_one_line_and_nothing_is_written(
    llm_dir: Path, tmp_path: Path, questions: Path, options: tuple[str, ...], message: str
) -> None:
    without = tmp_path / "without.jsonl"
    without.write_text(json.dumps({"question": "who", "answers": ["she"], "ctxs": []}) + "\n")
    files = {"QUESTIONS": str(questions), "WITHOUT": str(without)}
    result = run(llm_dir, tmp_path / "out", *(files.get(option, option) for option in options))
    assert_one_line(result, message)
    assert sorted(tmp_path.iterdir()) == sorted([questions, without])


def assert_one_line(result: Result, message: str) -> None:
    assert result.exit_code == 2, result.exception
    last = result.stderr.splitlines()[-1]
    assert last.lower().startswith("error: ") and message in last
    assert result.stderr.lower().count("error: ") == 1 and "Traceback" not in result.stderr


def test_an_llm_that_is_not_there(tmp_path: Path) -> None:
    result = run(tmp_path / "nothing", tmp_path / "out")
    assert_one_line(result, f"{tmp_path / 'nothing'}: cannot be loaded")
    assert not list(tmp_path.iterdir())


def test_an_llm_without_rotary_positions(make_llm, tokenizer, tmp_path: Path) -> None:
    make_llm("gpt2").save_pretrained(tmp_path / "llm")
    tokenizer.save_pretrained(tmp_path / "llm")
    result = run(tmp_path / "llm", tmp_path / "out")
    assert_one_line(result, "layer 0 of GPT2LMHeadModel has no rotary positions")
    assert [path.name for path in tmp_path.iterdir()] == ["llm"]


def test_something_else_is_not_replaced(llm_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("Dear")
    assert_one_line(run(llm_dir, tmp_path / "out"), "holds something that is not a checkpoint; give another directory")
    assert (tmp_path / "out" / "letter.txt").read_text() == "Dear" and len(list((tmp_path / "out").iterdir())) == 1


def calibrated(llm: Path, questions: Path, out: Path, *options: object) -> Result:
    result = run(llm, out, "--calibrate", questions, *(options or ("--max-layers", 2)))
    if result.exit_code == 0:
        assert {path.name for path in out.iterdir()} == {
            *("config.json", "model.safetensors", "calibration.csv", "calibration.png", "README.md")
        }
        assert not list(out.parent.glob("*.calibration.jsonl"))
    return result


def curve(out: Path) -> list[dict[str, str]]:
    with (out / "calibration.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_calibration_chooses_layers_and_leaves_its_curve(llm_dir: Path, questions: Path, tmp_path: Path) -> None:
    out = tmp_path / "deeper" / "out"
    result = calibrated(llm_dir, questions, out)
    assert result.exit_code == 0, result.output
    rows = curve(out)
    assert [row["layers"].count(" ") + 1 for row in rows[1:-1]] == [3, 2, 1]
    assert (rows[0]["kv_heads"], rows[-1]["kv_heads"]) == ("closed_book", "prompt")
    (chosen,) = [row for row in rows if row["chosen"] == "True"]
    assert chosen == min(rows[2:-1], key=lambda row: float(row["nats"]))
    record = read_record(out)
    assert " ".join(map(str, record["hypernetwork"]["layers"])) == chosen["layers"]
    assert record["hypernetwork"]["kv_heads"] is None
    summary = record["training"]["calibration"]
    assert (summary["questions"], summary["nats"]) == (3, float(chosen["nats"]))
    assert summary["closed_book_nats"] == float(rows[0]["nats"]) and summary["prompt_nats"] == float(rows[-1]["nats"])
    said = result.stdout.splitlines()
    assert said[0] == "nats per answer token, 3 questions:"
    for row, line in zip((rows[0], rows[-1], rows[1], chosen), said[1:5], strict=True):
        assert line.startswith(f"  {float(row['nats']):.3f} ")
    assert said[5].startswith(f"{out}: experts in {len(record['hypernetwork']['layers'])} layers")
    assert (out / "calibration.png").read_bytes().startswith(b"\x89PNG")


def test_calibration_of_heads(llm_dir: Path, questions: Path, tokenizer, tmp_path: Path) -> None:
    """Up to so many bytes: at most half of the six heads."""
    options = ("--max-bytes", "6KB", "--heads", "--num-questions", 2, "--batch-size", 1, "--seed", 1)
    result = calibrated(llm_dir, questions, tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    rows = curve(tmp_path / "out")[1:-1]
    assert [int(row["bytes"]) for row in rows] == sorted((int(row["bytes"]) for row in rows), reverse=True)
    (chosen,) = [row for row in rows if row["chosen"] == "True"]
    assert int(chosen["bytes"]) <= 6000 < int(rows[0]["bytes"]) and len(rows) == 5
    model = AutoModelForCausalLM.from_pretrained(llm_dir)
    loaded = load_hypernetwork(tmp_path / "out", model, tokenizer)
    heads = loaded.config.kv_heads or ((0, 1),) * len(loaded.config.layers)
    units = loaded(torch.randn(1, 2, *loaded.state_shape), torch.ones(1, 2, dtype=torch.bool)).units
    assert units.shape == (1, 2, 2 * sum(map(len, heads)), 8)


def test_as_many_questions_of_each_file(llm_dir: Path, questions: Path, tmp_path: Path, monkeypatch) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(questions.read_text().replace('"question": "', '"question": "again, '))
    asked: list[str] = []
    start = AnswerLoss.__init__

    def noted(self, examples, *arguments, **options):
        asked.extend(example.question for example in examples)
        start(self, examples, *arguments, **options)

    monkeypatch.setattr(AnswerLoss, "__init__", noted)
    options = ("--calibrate", other, "--max-layers", 1, "--num-questions", 4)
    result = calibrated(llm_dir, questions, tmp_path / "out", *options)
    assert result.exit_code == 0 and "nats per answer token, 4 questions:" in result.stdout
    assert [question.startswith("again, ") for question in asked] == [False, False, True, True]
    assert len(set(asked)) == 4


def test_nothing_fits(llm_dir: Path, questions: Path, tmp_path: Path) -> None:
    result = run(llm_dir, tmp_path / "out", "--calibrate", questions, "--max-bytes", "0.01KB")
    assert_one_line(result, "no choice of layers is within the limits")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("after", [0, 1, 4])
def test_an_interrupted_calibration_goes_on(
    llm_dir: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    measured: list[tuple[int, ...]] = []
    stop = {"after": -1}
    with_experts = AnswerLoss.with_experts

    def counted(self, config, near):
        if len(measured) == stop["after"]:
            raise KeyboardInterrupt
        measured.append(config.layers)
        return with_experts(self, config, near)

    monkeypatch.setattr(AnswerLoss, "with_experts", counted)
    assert calibrated(llm_dir, questions, tmp_path / "whole").exit_code == 0
    expected = measured.copy()
    measured.clear()
    stop["after"] = after
    result = run(llm_dir, tmp_path / "out", "--calibrate", questions, "--max-layers", 2)
    assert result.exit_code == 130 and "interrupted\n" in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists() and (tmp_path / "out.calibration.jsonl").is_file()
    stop["after"] = -1
    assert calibrated(llm_dir, questions, tmp_path / "out").exit_code == 0
    assert measured == expected and len(set(measured)) == len(measured)
    for name in ("config.json", "model.safetensors", "calibration.csv"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_help() -> None:
    group = CliRunner().invoke(main, ["experts", "--help"])
    assert group.exit_code == 0 and "create" in group.output
    text = CliRunner().invoke(main, ["experts", "create", "--help"]).output
    for parameter in create.params:
        assert all(option in text for option in parameter.opts)
        assert getattr(parameter, "help", None) or parameter.name == "device"


def test_the_card_says_what_it_is_and_how_it_was_made(llm_dir: Path, questions: Path, tmp_path: Path) -> None:
    for number, options in enumerate(
        ((), ("--calibrate", str(questions), "--max-layers", "1", "--num-questions", "3"))
    ):
        out = tmp_path / f"out{number}"
        assert run(llm_dir, out, *options).exit_code == 0
        card = (out / "README.md").read_text(encoding="utf-8")
        assert f"# Attention experts for `{llm_dir.name}`" in card
        assert shlex.join(["genpoe", "experts", "create", "--llm", llm_dir.name, "--out", out.name]) in card
        assert ("calibration.csv" in card) == bool(options) == (out / "calibration.csv").is_file()
        assert f'"hypernetwork": "{out.name}"' in card
        assert str(tmp_path) not in card and str(llm_dir) not in card
        about = yaml.safe_load(card.split("---\n")[1])
        assert ("model-index" in about) == bool(options)
    assert hashlib.sha256(questions.read_bytes()).hexdigest() in card
    assert shlex.join(["--calibrate", questions.name, "--max-layers", "1"]) in card
    chosen = read_record(out)["training"]["calibration"]["nats"]
    assert about["model-index"][0]["results"][0]["metrics"] == [{"type": "nats", "value": round(chosen, 4)}]


def test_the_card_says_what_it_was_told_and_no_folder(llm_dir: Path, tmp_path: Path, monkeypatch) -> None:
    """The directory need not be there yet, nor be named from the root."""
    monkeypatch.chdir(tmp_path)
    options = ["--dataset", "org/nq", "--dataset", "org/squad", "--licence", "apache-2.0"]
    assert run(llm_dir, Path("some/where/mine"), *options).exit_code == 0
    card = (tmp_path / "some/where/mine/README.md").read_text(encoding="utf-8")
    about = yaml.safe_load(card.split("---\n")[1])
    assert (about["license"], about["datasets"]) == ("apache-2.0", ["org/nq", "org/squad"])
    assert "some/where" not in card
    assert shlex.join(["--out", "mine", *options]) in card
