"""The built package in a fresh environment, under the stock lm_eval (``make wheel-test``).

The environments see the packages of the one that runs the tests by a path file, which brings their modules but does not
execute their start-up files; so nothing but the package under test can register with lm-eval.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.wheel

REPOSITORY = Path(__file__).parents[2]
GROUPS = {"genpoe", "genpoe_all"}
DATA_SETS = ("nq", "tqa", "popqa", "squad", "narrativeqa", "hotpotqa", "2wiki", "mquake", "conflict")
TASKS = {f"genpoe_{name}{kind}" for name in DATA_SETS for kind in ("", "_nats")} | {
    "genpoe_unanswerable",
    "genpoe_demo",
}
Run = Callable[..., str]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = ["pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder), str(REPOSITORY)]
    subprocess.run([sys.executable, "-m", *command], check=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module", params=["wheel", "editable"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Runs the environment's python, anywhere but in the repository; at the end, uninstalls and looks for traces."""
    environment = tmp_path_factory.mktemp(request.param)
    venv.create(environment, with_pip=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def run_python(*arguments: str, **variables: str) -> str:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        done = subprocess.run(
            [_python(environment), *arguments],
            env=inherited | variables,
            cwd=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    before = _files(environment)
    what = ["-e", str(REPOSITORY)] if request.param == "editable" else [str(request.getfixturevalue("wheel"))]
    install = ["install", "--quiet", "--no-deps", "--no-build-isolation", "--ignore-installed"]
    run_python("-m", "pip", *install, *what)
    yield run_python
    run_python("-m", "pip", "uninstall", "--quiet", "--yes", "lm-eval-genpoe")
    assert _files(environment) == before


def _python(environment: Path) -> str:
    return str(environment / "bin/python")


def _files(environment: Path) -> set[Path]:
    return {path for path in environment.rglob("*") if "pip" not in path.parts and path.name != "__pycache__"}


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "nq_open.jsonl"
    path.write_text("".join(json.dumps({"question": f"question {i}", "answer": ["x"]}) + "\n" for i in range(3)))
    return path


def test_lm_eval_lists_the_tasks(run: Run) -> None:
    listed = run("-m", "lm_eval", "ls", "tasks")
    assert set(re.findall(r"^\|\s*(genpoe\w*)\s*\|", listed, re.MULTILINE)) == GROUPS | TASKS


@pytest.mark.parametrize("model", ["genpoe", "hf"])
def test_lm_eval_runs_model_and_task(run: Run, model: str, llm_dir: Path, questions: Path, tmp_path: Path) -> None:
    mode = ",mode=closed_book" if model == "genpoe" else ""
    run(
        *["-m", "lm_eval", "--model", model, "--model_args", f"pretrained={llm_dir}{mode}", "--device", "cpu"],
        *["--tasks", "genpoe_nq", "--metadata", json.dumps({"genpoe_data": str(questions)})],
        *["--output_path", str(tmp_path / "results.json")],
    )
    (results,) = tmp_path.rglob("results*.json")
    assert json.loads(results.read_text())["results"]["genpoe_nq"]["em,none"] == 0.0


def test_switched_off(run: Run) -> None:
    code = "import lm_eval.models as m; from lm_eval.api.registry import model_registry as r; print('genpoe' in r)"
    assert run("-c", code).strip() == "True"
    assert run("-c", code, GENPOE_NO_AUTOLOAD="1").strip() == "False"


def test_bare_start_up_grows_by_less_than_a_third_of_a_millisecond(run: Run) -> None:
    line = re.compile(r"^import time: +(\d+) \| +\d+ \|  *(lm_eval_genpoe_autoload|genpoe_plugin.*)", re.MULTILINE)
    found = [line.findall(run("-X", "importtime", "-c", "pass")) for _ in range(7)]
    assert {tuple(name for _, name in one) for one in found} == {("lm_eval_genpoe_autoload",)}
    assert 0 < min(int(microseconds) for ((microseconds, _),) in found) < 333


def test_the_command(run: Run) -> None:
    assert run("-m", "train_cli", "--version").startswith("genpoe, version")


def test_no_module_named_tasks_is_installed(run: Run, request: pytest.FixtureRequest) -> None:
    if request.node.callspec.params["run"] == "editable":
        pytest.skip("an editable install sees the whole checkout")
    assert run("-c", "import importlib.util as u; print(u.find_spec('tasks'))").strip() == "None"


def test_the_wheel_has_the_demos_assets(wheel: Path) -> None:
    listed = subprocess.run(
        [sys.executable, "-m", "zipfile", "-l", str(wheel)],
        capture_output=True,
        text=True,
    ).stdout
    for asset in (REPOSITORY / "genpoe_plugin/demo/assets").rglob("*.*"):
        assert str(asset.relative_to(REPOSITORY)) in listed
