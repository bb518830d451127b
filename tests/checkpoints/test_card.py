"""The model card: read back as the hub (YAML), a Markdown reader and a shell would."""

from __future__ import annotations

import ast
import hashlib
import json
import platform
import shlex
import shutil
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal
from unittest.mock import patch

import lm_eval._cli
import pytest
import yaml
from huggingface_hub import ModelCardData
from markdown_it import MarkdownIt
from markdown_it.token import Token

from genpoe_plugin import GenPoEModel, __version__
from genpoe_plugin.arguments import GenPoEArguments
from genpoe_plugin.checkpoints.card import DataFile, ModelCard, lm_eval_command, name_in_card, write_card
from genpoe_plugin.llm.language_model import load_language_model
from genpoe_plugin.training.creation import attention_config, create_attention_experts
from train_cli.retrieve import retrieve as retrieve_command

NASTY = "a|b\\|c\n``d`` <i> *e* _f_ [g](h)\r\n| i |"
COMMAND = [
    "genpoe",
    "train",
    "hypernetwork",
    "--model",
    "org/llm",
    "--data",
    "my `data`'s|\n```\nfile.jsonl",
    "--out",
    "",
]
CARD = ModelCard(
    kind="hypernetwork",
    base_model="org/llm",
    out="out, of 7",
    form={"rank": 512, "encoder": "mean"},
    data=[DataFile("training", "train|.jsonl", "ab" * 32, 1234), DataFile("validation", "dev.jsonl", "cd" * 32, 5)],
    arguments={
        "learning_rate": 1e-4,
        "max_steps": None,
        "prompt": NASTY,
        "a|b": "`",
        "path": "a\\|b",
        "empty": "",
        "targets": ("q", "v"),
    },
    command=COMMAND,
    steps=1200,
    validations=[{"step": 400, "em": 0.1}, {"step": 800, "em": 0.3, "f|1": 0.4}, {"step": 1200, "em": 0.25}],
    best=800,
    lm_eval_arguments={"num_passages": 4},
)


def read(directory: Path, card: ModelCard) -> tuple[dict[str, object], list[Token]]:
    """Front matter, and the tokens of a Markdown reader."""
    write_card(directory, card)
    _, front, body = (directory / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), MarkdownIt("commonmark").enable("table").parse(body)


def tables(tokens: list[Token]) -> dict[str, list[list[str]]]:
    """The rows of every table, header first, by the first cell of the header."""
    found: list[list[list[str]]] = []
    for token in tokens:
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type == "inline" and token.level > 3:
            children = token.children or []
            assert len(children) <= 1, "one text or one code span, nothing that was taken for markup"
            found[-1][-1].append(children[0].content if children else "")
    return {table[0][0]: table for table in found}


def blocks(tokens: list[Token], language: str) -> list[str]:
    return [token.content for token in tokens if token.type == "fence" and token.info == language]


def test_front_matter(tmp_path: Path) -> None:
    front, _ = read(tmp_path, CARD)
    assert front["base_model"] == "org/llm"
    assert front["library_name"] == "genpoe"
    assert {"genpoe", "hypernetwork"} <= set(front["tags"])  # type: ignore[call-overload]
    assert front["pipeline_tag"] == "question-answering"
    assert not {"license", "datasets"} & set(front)
    front, _ = read(tmp_path, replace(CARD, kind="reranker", licence="apache-2.0", datasets=["org/nq", "org/squad"]))
    assert front["license"] == "apache-2.0"
    assert front["datasets"] == ["org/nq", "org/squad"]
    assert front["library_name"] == "transformers"
    assert front["pipeline_tag"] == "text-ranking"
    assert {"genpoe", "reranker"} <= set(front["tags"])  # type: ignore[call-overload]


def results(front: dict[str, object]) -> dict[str, object]:
    """Of the hub's model-index, as huggingface_hub reads it: the value of every metric."""
    read_back = ModelCardData(**front)
    assert read_back.eval_results is not None
    assert {one.task_type for one in read_back.eval_results} == {front["pipeline_tag"]}
    assert {(one.dataset_type, one.dataset_name) for one in read_back.eval_results} == {("dev", "dev.jsonl")}
    return {one.metric_type: one.metric_value for one in read_back.eval_results}


def test_the_model_index_has_what_was_measured_of_these_weights(tmp_path: Path) -> None:
    """Those of the best step; nothing where there was no other data than that of the training."""
    front, _ = read(tmp_path, CARD)
    assert results(front) == {"exact_match": 0.3, "f|1": 0.4}
    front, _ = read(tmp_path, replace(CARD, best=None))
    assert results(front) == {"exact_match": 0.25}
    ranked = replace(CARD, kind="reranker", validations=[{"step": 1200, "mrr@10": 0.123456}], best=1200)
    assert results(read(tmp_path, ranked)[0]) == {"mrr@10": 0.1235}
    calibrated = DataFile("calibration", "/somewhere/dev.jsonl", "ef" * 32, 5)
    made = replace(CARD, kind="experts", steps=0, best=None, data=[calibrated], validations=[{"step": 0, "nats": 2.5}])
    assert results(read(tmp_path, made)[0]) == {"nats": 2.5}
    for without in (replace(CARD, data=CARD.data[:1]), replace(CARD, validations=[], best=None)):
        assert "model-index" not in read(tmp_path, without)[0]


@pytest.mark.parametrize("kind", ["hypernetwork", "experts", "reranker"])
def test_no_folder_of_this_machine_is_in_it(
    tmp_path: Path, kind: Literal["hypernetwork", "experts", "reranker"]
) -> None:
    for name in ("llm", "out"):
        (tmp_path / name).mkdir()
    data = [
        DataFile("training", str(tmp_path / "a.jsonl"), "ab" * 32, 1),
        DataFile("validation", "/data/b.jsonl", "", 1),
    ]
    options = {"model": tmp_path / "llm", "data": tmp_path / "a.jsonl", "validation": "/data/b.jsonl", "out": "org/new"}
    command = ["genpoe", "train", *(word for name, value in options.items() for word in (f"--{name}", str(value)))]
    card = replace(
        CARD, kind=kind, base_model=str(tmp_path / "llm"), out=str(tmp_path / "out"), data=data, command=command
    )
    _, tokens = read(tmp_path / "out", card)
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert str(tmp_path) not in text and "/data/" not in text
    expected = ["genpoe", "train", "--model", "llm", "--data", "a.jsonl", "--validation", "b.jsonl", "--out", "org/new"]
    assert shlex.split(blocks(tokens, "bash")[-1]) == expected
    assert [row[0] for row in tables(tokens)["data"][1:]] == ["a.jsonl", "b.jsonl"]


def test_a_base_model_with_a_revision_is_that_model_for_the_hub(tmp_path: Path) -> None:
    front, tokens = read(tmp_path, replace(CARD, base_model="org/llm@v1"))
    assert front["base_model"] == "org/llm"
    assert 'from_pretrained("org/llm@v1", ' in blocks(tokens, "python")[0]


def test_the_example_runs_as_it_stands(
    tmp_path: Path, llm_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the folder that has both directories, by the names that the card has."""
    shutil.copytree(llm_dir, tmp_path / "the 'llm'")
    llm, tokenizer = load_language_model(str(tmp_path / "the 'llm'"))
    out = tmp_path / 'the "experts"'
    create_attention_experts(out, attention_config(llm, (0, 2)), llm, tokenizer)
    card = replace(CARD, kind="experts", base_model=str(tmp_path / "the 'llm'"), out=str(out))
    (example,) = blocks(read(out, card)[1], "python")
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})
    model = GenPoEModel.from_pretrained("the 'llm'", out)
    passages = ["Rossini: Gioachino Rossini was born in Pesaro in 1792."]
    assert capsys.readouterr().out == f"{model.generate(['Where was Rossini born?'], [passages])}\n"


@pytest.mark.parametrize("out", ["out, of 7", 'the "experts"', "it's", "back\\slash"])
def test_another_name_for_the_checkpoint_is_put_into_all_that_loads_it(tmp_path: Path, out: str) -> None:
    read(tmp_path, replace(CARD, out=out))
    text = name_in_card((tmp_path / "README.md").read_text(encoding="utf-8"), "someone/experts@v1")
    _, _, body = text.split("---\n", 2)
    tokens = MarkdownIt("commonmark").enable("table").parse(body)
    renamed = replace(CARD, out="someone/experts@v1")
    on_file, on_tasks, training = (shlex.split(block) for block in blocks(tokens, "bash"))
    assert on_file == lm_eval_command(renamed, ["genpoe_nq"], data="dev.jsonl")
    assert on_tasks == lm_eval_command(renamed, ["genpoe_nq", "genpoe_tqa"], index="INDEX")
    assert training == COMMAND
    assert 'from_pretrained("org/llm", "someone/experts@v1")' in blocks(tokens, "python")[0]
    assert name_in_card("a card by hand", "someone/experts") == "a card by hand"


@pytest.mark.parametrize("base_model", ["/data/llm: x", "no/such/hub/name", "{tmp_path}", "org/llm\n- x"])
def test_a_base_model_that_the_hub_cannot_have_is_named_in_the_text_only(tmp_path: Path, base_model: str) -> None:
    """By the last part of its path."""
    base_model = base_model.format(tmp_path=tmp_path)
    front, tokens = read(tmp_path, replace(CARD, base_model=base_model))
    assert "base_model" not in front
    (heading,) = [token for number, token in enumerate(tokens[1:]) if tokens[number].tag == "h1" and token.children]
    assert heading.children is not None
    shown = base_model.rpartition("/")[2]
    assert heading.children[-1].content in (shown, json.dumps(shown))


def test_tables_keep_every_value_whatever_it_holds(tmp_path: Path) -> None:
    _, tokens = read(tmp_path, CARD)
    found = tables(tokens)
    assert found["argument"][1:] == [
        ["learning_rate", "0.0001"],
        ["max_steps", "null"],
        ["prompt", json.dumps(NASTY)],
        ["a|b", "`"],
        ["path", json.dumps("a\\|b")],
        ["empty", '""'],
        ["targets", '["q", "v"]'],
    ]
    assert found["made of"][1:] == [["rank", "512"], ["encoder", "mean"]]
    assert found["data"][1:] == [
        ["train|.jsonl", "training", "1,234", "ab" * 32],
        ["dev.jsonl", "validation", "5", "cd" * 32],
    ]
    versions = {"genpoe": __version__, **{name: version(name) for name in ("torch", "transformers")}}
    assert dict(found["software"][1:]) == {**versions, "python": platform.python_version()}


def test_scores_are_those_of_the_first_the_best_and_the_last_validation(tmp_path: Path) -> None:
    _, tokens = read(tmp_path, CARD)
    assert tables(tokens)["validation"] == [
        ["validation", "step", "em", "f|1"],
        ["first", "400", "0.1000", ""],
        ["best", "800", "0.3000", "0.4000"],
        ["last", "1,200", "0.2500", ""],
    ]
    _, tokens = read(tmp_path, replace(CARD, validations=CARD.validations[:1], best=400))
    assert tables(tokens)["validation"][1:] == [["first, best, last", "400", "0.1000"]]
    _, tokens = read(tmp_path, replace(CARD, validations=[], best=None))
    assert "validation" not in tables(tokens)
    assert any(token.content == "There was no validation data." for token in tokens)


def test_the_curves_are_shown_where_there_are_any(tmp_path: Path) -> None:
    def targets() -> list[object]:
        children = [child for token in read(tmp_path, CARD)[1] for child in token.children or []]
        return [
            child.attrs.get("src") or child.attrs["href"] for child in children if child.type in ("image", "link_open")
        ]

    assert not {"curves.png", "loss.csv"} & {*targets()}
    for name in ("curves.png", "loss.csv"):
        (tmp_path / name).touch()
    assert {"curves.png", "loss.csv"} <= {*targets()}
    assert "validation.csv" not in targets()


def test_commands_are_the_ones_given_and_nothing_else(tmp_path: Path) -> None:
    _, tokens = read(tmp_path, CARD)
    on_file, on_tasks, training = (shlex.split(block) for block in blocks(tokens, "bash"))
    assert training == COMMAND
    assert on_file == lm_eval_command(CARD, ["genpoe_nq"], data="dev.jsonl")
    assert on_tasks == lm_eval_command(CARD, ["genpoe_nq", "genpoe_tqa"], index="INDEX")


def test_lm_eval_understands_its_command() -> None:
    card = replace(CARD, base_model="7", out="out, of 'x'=[1")
    with patch.object(sys, "argv", lm_eval_command(card, ["genpoe_nq", "genpoe_tqa"], data='d "1".jsonl')):
        options = lm_eval._cli.HarnessCLI().parse_args()
    assert options.model == "genpoe"
    assert options.tasks == ["genpoe_nq", "genpoe_tqa"]
    assert options.metadata == {"genpoe_data": 'd "1".jsonl'}
    expected = {"pretrained": "7", "mode": "genpoe", "hypernetwork": card.out, "num_passages": 4}
    assert options.model_args == expected
    del expected["pretrained"]
    GenPoEArguments(**expected)


def test_how_to_use_a_reranker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name_of_it = 'it\'s\n"mine"'
    _, tokens = read(tmp_path, replace(CARD, kind="reranker", out=name_of_it))
    (python,) = blocks(tokens, "python")
    loads = [node for node in ast.walk(ast.parse(python)) if isinstance(node, ast.Call)]
    assert [ast.literal_eval(node.args[0]) for node in loads if ast.unparse(node.func) == "Reranker.load"] == [
        name_of_it
    ]
    retrieve, training = (shlex.split(block) for block in blocks(tokens, "bash"))
    program, name, *options = retrieve
    assert (program, name) == ("genpoe", "retrieve")
    monkeypatch.chdir(tmp_path)
    for argument in ("INDEX", "QUESTIONS"):
        Path(argument).mkdir()
    with retrieve_command.make_context(name, options) as context:
        assert context.params["reranker"] == name_of_it
    assert training == COMMAND


def test_a_data_file_is_hashed_whole(tmp_path: Path) -> None:
    content = b"{}\n" * 300_000
    (tmp_path / "data.jsonl").write_bytes(content)
    described = DataFile.read("training", tmp_path / "data.jsonl", 17)
    assert described == DataFile("training", str(tmp_path / "data.jsonl"), hashlib.sha256(content).hexdigest(), 17)


def test_a_file_name_that_is_no_text_does_not_cost_the_card(tmp_path: Path) -> None:
    _, tokens = read(tmp_path, replace(CARD, command=["genpoe", "\udc80"]))
    assert "\\udc80" in blocks(tokens, "bash")[-1]


def test_nothing_is_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "README.md").write_bytes(b"old")

    def fail(self: Path, text: str, **_: object) -> None:
        self.write_bytes(text.encode()[:100])
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError, match="disk full"):
        write_card(tmp_path, CARD)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("README.md", b"old")]


def test_a_card_says_where_its_experts_are(tmp_path):
    for head, place in (("memory", "beside one MLP"), ("attention", "in the attention of")):
        write_card(tmp_path, replace(CARD, form={"head": head}))
        assert place in (tmp_path / "README.md").read_text(encoding="utf-8")
