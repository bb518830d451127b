"""README, docs and CONTRIBUTING against the code: whatever a reader may type or look for is there."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
import sys
from pathlib import Path
from unittest.mock import patch

import click
import lm_eval._cli
import pytest
from lm_eval.models.huggingface import HFLM

from genpoe_plugin.arguments import ARGUMENTS, DEFAULTS, PASSAGE_MODES, GenPoEArguments, Use
from genpoe_plugin.demo.world import make_world
from genpoe_plugin.demo.world_demo import RUNS, DemoSettings
from genpoe_plugin.demo.world_table import Row, render
from genpoe_plugin.lm.argument_names import accepted_names
from genpoe_plugin.lm.hf import GenPoELM
from genpoe_plugin.prompts import EXPERT_MODES, MODES
from genpoe_plugin.registration import MODELS
from genpoe_plugin.selection.controls import CONTROLS
from tasks import open_qa
from train_cli.main import main

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
DOCS = {path.name: path.read_text(encoding="utf-8") for path in sorted((REPOSITORY / "docs").glob("*.md"))}
TEXTS = {"README.md": README, "CONTRIBUTING.md": CONTRIBUTING, **DOCS}
ALL = "\n".join((README, *DOCS.values()))
"""For users."""
BLOB = "https://github.com/lm-eval-genpoe/lm-eval-genpoe/blob/main/"
TASKS = {
    name
    for path in (REPOSITORY / "tasks").glob("*.yaml")
    for name in re.findall(r"^(?:task|group): (\S+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
}


def code_lines(text: str) -> list[str]:
    """The lines of indented and of fenced code blocks, continued lines joined."""
    fenced = re.findall(r"^```.*?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    indented = re.findall(r"(?:^|\n)\n((?: {4}.*\n|\n(?= {4}))+)", text)
    return re.sub(r"\\\n\s*", "", "\n".join([*fenced, *indented])).splitlines()


def commands(text: str, program: str) -> list[str]:
    """Every command of ``program`` in code blocks and, with arguments, in code spans."""
    spans = [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]
    found = [line.strip() for line in [*code_lines(text), *spans]]
    return sorted({line for line in found if line.startswith(f"{program} ")})


def table(text: str, first: str) -> list[list[str]]:
    """The cells of the table whose header begins with ``first``: its header, then its rows."""
    (block,) = re.findall(rf"^(\| {re.escape(first)} \|.*\n(?:\|.*\n)+)", text, re.MULTILINE)
    header, _, *rows = [[cell.strip() for cell in line.strip(" |").split(" |")] for line in block.splitlines()]
    assert {len(row) for row in rows} == {len(header)}
    return [header, *rows]


def parse(command: click.Command, arguments: list[str]) -> None:
    """As click does before it calls a command: through the groups to the command, whose options are all checked."""
    if isinstance(command, click.Group) and arguments and not arguments[0].startswith("-"):
        _, inner, rest = command.resolve_command(click.Context(command), arguments)
        assert inner is not None
        parse(inner, rest)
    else:
        command.make_context(command.name, list(arguments))


def test_genpoe_commands_parse() -> None:
    found = [shlex.split(command, comments=True)[1:] for text in TEXTS.values() for command in commands(text, "genpoe")]
    for arguments in found:
        parse(main, arguments)
    used = {tuple(word for word in arguments[:2] if word.isalpha()) for arguments in found}
    assert {("index", "build"), ("train", "reranker"), ("train", "hypernetwork"), ("data", "reranker")} <= used


def test_the_readme_is_short() -> None:
    assert len(README.split()) <= 900


def test_what_does_not_exist_does_not_parse() -> None:
    """Or the tests here would prove nothing."""
    for wrong in ("tarin reranker", "demo --size 3", "train hypernetwork --model x --data y", "data reranker --out x"):
        with pytest.raises(click.UsageError):
            parse(main, shlex.split(wrong))


def test_lm_eval_commands_parse_and_name_what_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [command for text in (README, *DOCS.values()) for command in commands(text, "lm_eval")]
    found = [command for command in found if "--tasks" in command]
    assert len(found) >= 2
    monkeypatch.chdir(tmp_path)
    complete = 0
    for command in found:
        words = shlex.split(command, comments=True)
        elided = words[-1] == "..."
        with patch.object(sys, "argv", words[: -2 if elided else None]):
            options = lm_eval._cli.HarnessCLI().parse_args()
        assert options.model in MODELS
        assert {*options.tasks} <= TASKS
        assert {*(options.metadata or {})} <= {*inspect.signature(open_qa.questions).parameters}
        if elided:
            assert words[-2] == "--model_args"
            continue
        complete += 1
        given = options.model_args
        # Those of vLLM are looked at where there is one, in tests/lm/vllm/test_readme.py.
        assert options.model == "genpoe-vllm" or {*given} <= accepted_names(GenPoELM, HFLM)
        if index := given.get("index"):
            # The values are checked as well, and that it is there is one of the checks.
            Path(index).mkdir(exist_ok=True)
        GenPoEArguments(**{name: value for name, value in given.items() if name in ARGUMENTS})
    assert complete


def decides(use: Use) -> str:
    """When an argument decides an answer, as the table of arguments says it."""
    if not use.decides:
        return "never"
    modes = {MODES: "always", PASSAGE_MODES: "with passages", EXPERT_MODES: "with experts"}[tuple(use.modes)]
    without = [f"`{control}`" for control in CONTROLS if control not in (*use.controls, "none")]
    return f"{modes}, but not {', '.join(without)}" if without else modes


def test_the_table_of_arguments_is_their_declaration() -> None:
    header, *rows = table(DOCS["evaluating.md"], "argument")
    assert header == ["argument", "default", "decides", "meaning"]
    assert rows == [
        [f"`{name}`", "" if DEFAULTS[name] is None else str(DEFAULTS[name]), decides(use), use.meaning]
        for name, use in ARGUMENTS.items()
    ]


def test_the_meaning_of_an_argument_names_all_its_values() -> None:
    for name, use in ARGUMENTS.items():
        if use.choices is not None:
            assert {DEFAULTS[name], *re.findall(r"`(\w+)`", use.meaning)} == {*use.choices}, name


def test_the_table_is_one_that_the_demo_prints() -> None:
    """Some of its columns, all of its rows, and scores that so many questions can have."""
    header, *rows = table(DOCS["getting-started.md"], "mode")
    printed = re.split(r"  +", render([Row("m", "p", 1, 0, 0, 0, 0, 0)]).splitlines()[0].strip())
    assert [column for column in printed if column in header] == header
    assert [(row[header.index("mode")], row[header.index("passages")]) for row in rows] == list(RUNS)
    n = len(make_world(0, 0, DemoSettings().test_entities).questions["test"])
    assert f"{n:,}\nquestions" in DOCS["getting-started.md"]
    possible = set()
    for right in range(n + 1):
        em = right / n
        possible.add(f"{100 * em:.1f} ± {100 * (em * (1 - em) / (n - 1)) ** 0.5:.1f}")
    assert {row[header.index("EM ± se")] for row in rows} <= possible
    scores = {(row[0], row[1]): row[header.index("EM ± se")].split()[0] for row in rows}
    for stated in re.findall(r"\(([\d.]+) against ([\d.]+) for another question's\)", ALL):
        assert stated == (scores["genpoe", "gold"], scores["genpoe", "shuffled"])


@pytest.mark.parametrize("name", TEXTS)
def test_links_paths_and_targets_exist(name: str) -> None:
    text = TEXTS[name]
    folder = REPOSITORY / "docs" if name in DOCS else REPOSITORY
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        if link.startswith(BLOB):
            assert (REPOSITORY / link.removeprefix(BLOB)).exists(), link
        assert link.startswith("https://") or (folder / link).exists(), link
    top = {path.name for path in REPOSITORY.iterdir()}
    for path in re.findall(r"(?<![\w./-])([\w.-]+(?:/[\w.-]*\w)+)", text):
        assert path.split("/")[0] not in top or (REPOSITORY / path).exists(), path
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    targets = {target for line in re.findall(r"^([\w -]+):(?!=)", makefile, re.MULTILINE) for target in line.split()}
    assert {command.split()[1] for command in commands(text, "make")} <= targets


def test_every_page_is_two_clicks_from_the_start_page() -> None:
    linked = {link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", DOCS["index.md"])}
    assert set(DOCS) - {"index.md"} <= linked


def test_the_picture_of_the_repository_is_right() -> None:
    """CONTRIBUTING's list of folders and modules."""
    (block,) = re.findall(r"## Where things are\n\n((?: {4}.*\n)+)", CONTRIBUTING)
    folder = ""
    listed = {}
    for line in block.splitlines():
        folder = line[4:21].strip() or folder
        module, *_ = [*line[21:].split(), ""]
        if re.fullmatch(r"\w+(\.py|/)", module) and line[21] != " ":
            listed[f"{folder}{module}"] = (REPOSITORY / folder / module).exists()
        assert (REPOSITORY / folder).is_dir(), folder
    assert len(listed) > 10
    assert [path for path, exists in listed.items() if not exists] == []


def test_tests_that_contributing_names_exist() -> None:
    named = re.findall(r"(tests/[\w/]+\.py)::(\w+)", CONTRIBUTING)
    assert len(named) > 15
    for path, function in named:
        tree = ast.parse((REPOSITORY / path).read_text(encoding="utf-8"))
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{path}::{function}"
