"""The model card: read back as the hub (YAML), a Markdown reader and a shell would."""

from __future__ import annotations

import ast
import hashlib
import json
import platform
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import lm_eval._cli
import pytest
import torch
import transformers
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token

from genpoe_plugin import __version__
from genpoe_plugin.lm import GenPoEArguments
from genpoe_plugin.training.card import DataFile, ModelCard, lm_eval_command, write_card
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
    assert "license" not in front
    front, _ = read(tmp_path, replace(CARD, kind="reranker", licence="apache-2.0"))
    assert front["license"] == "apache-2.0"
    assert front["library_name"] == "transformers"
    assert {"genpoe", "reranker"} <= set(front["tags"])  # type: ignore[call-overload]


@pytest.mark.parametrize("base_model", ["/data/llm: x", "no/such/hub/name", "{tmp_path}", "org/llm\n- x"])
def test_a_base_model_that_the_hub_cannot_have_is_named_in_the_text_only(tmp_path: Path, base_model: str) -> None:
    base_model = base_model.format(tmp_path=tmp_path)
    front, tokens = read(tmp_path, replace(CARD, base_model=base_model))
    assert "base_model" not in front
    (heading,) = [token for number, token in enumerate(tokens[1:]) if tokens[number].tag == "h1" and token.children]
    assert heading.children is not None
    assert heading.children[-1].content in (base_model, json.dumps(base_model))


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
    versions = {"genpoe": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
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
