"""The start-up file and the import hook, in new interpreters, with a fake lm-eval and with the real one."""

from __future__ import annotations

import errno
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from genpoe_plugin import interrupts, registration

REPOSITORY = Path(__file__).parents[1]

REGISTRY = """
class Registry(dict):
    def register(self, name, target):
        assert name not in self
        self[name] = target
model_registry = Registry()
"""
INDEX = """
class TaskIndex:
    @staticmethod
    def build(paths, *, resolve_includes=True):
        return [str(path) for path in paths]
"""
OURS = {"genpoe": "genpoe_plugin.lm.hf:GenPoELM", "genpoe-vllm": "genpoe_plugin.lm.vllm:GenPoEVLLM"}
MODELS = "from lm_eval.api.registry import model_registry\nmodel_registry.register('hf', target='a:B')\n"


def write_lm_eval(root: Path, *, registry: str = REGISTRY, index: str = INDEX) -> Path:
    """Write a fake lm-eval with the parts that the hook uses, and return its built-in task folder."""
    files = {
        "__init__.py": "",
        "api/__init__.py": "",
        "api/registry.py": registry,
        "models/__init__.py": MODELS,
        "tasks/__init__.py": "",
        "tasks/_index.py": index,
    }
    for name, text in files.items():
        path = root / "lm_eval" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root / "lm_eval" / "tasks"


STARTUP = REPOSITORY / "genpoe_plugin/startup/lm_eval_genpoe_autoload.pth"  # beside its module, as in site-packages


def run(code: str, *paths: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a new interpreter after the line of our start-up file."""
    # Some versions of requests warn about some versions of charset-normalizer.
    environment = {
        "PYTHONWARNINGS": "ignore:::requests",
        "PYTHONPATH": os.pathsep.join(map(str, [*paths, REPOSITORY, STARTUP.parent])),
        **environment,
    }
    return subprocess.run(
        [sys.executable, "-c", f"{STARTUP.read_text()}\n{code}"],
        env=os.environ | {"GENPOE_NO_AUTOLOAD": "0"} | environment,
        cwd="/",
        capture_output=True,
        text=True,
    )


def output(code: str, *paths: Path, **environment: str) -> object:
    done = run("import json\n" + code, *paths, **environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


LIST_MODELS = """
import lm_eval.models
from lm_eval.api.registry import model_registry
print(json.dumps(model_registry))
"""
LIST_FOLDERS = """
import pathlib, lm_eval.tasks._index as index
built_in = pathlib.Path(index.__file__).parent
mine = pathlib.Path("/mine")
print(json.dumps([index.TaskIndex.build([built_in, mine]), index.TaskIndex().build([mine])]))
"""


def test_model_and_tasks_are_added_to_what_lm_eval_has(tmp_path: Path) -> None:
    built_in = write_lm_eval(tmp_path)
    assert output(LIST_MODELS, tmp_path) == {"hf": "a:B", **OURS}
    # Directly after the built-in folder, so --include_path has priority; not added without the built-in tasks.
    assert output(LIST_FOLDERS, tmp_path) == [[str(built_in), str(REPOSITORY / "tasks"), "/mine"], ["/mine"]]


def test_lm_eval_imported_before_the_hook(tmp_path: Path) -> None:
    write_lm_eval(tmp_path)
    code = """
import sys
del sys.meta_path[0]  # added by the start-up file
import lm_eval.models
import genpoe_plugin.registration as registration
registration.install()
registration.install()
"""
    assert output(code + LIST_MODELS, tmp_path) == {"hf": "a:B", **OURS}


def test_an_lm_eval_that_discovers_entry_points_is_left_alone(tmp_path: Path) -> None:
    registry = REGISTRY + "def load_plugins(group, registry): pass\n"
    built_in = write_lm_eval(tmp_path, registry=registry)
    assert output(LIST_MODELS, tmp_path) == {"hf": "a:B"}
    # Entry points for tasks are newer than those for models. A folder that lm-eval passes itself is not added twice.
    discovered = LIST_FOLDERS.replace("[built_in,", f"[built_in, pathlib.Path({str(REPOSITORY / 'tasks')!r}),")
    assert output(discovered, tmp_path) == [[str(built_in), str(REPOSITORY / "tasks"), "/mine"], ["/mine"]]


def test_switched_off(tmp_path: Path) -> None:
    built_in = write_lm_eval(tmp_path)
    assert output(LIST_MODELS, tmp_path, GENPOE_NO_AUTOLOAD="1") == {"hf": "a:B"}
    assert output(LIST_FOLDERS, tmp_path, GENPOE_NO_AUTOLOAD="1") == [[str(built_in), "/mine"], ["/mine"]]


def test_an_lm_eval_of_another_shape_still_works(tmp_path: Path) -> None:
    write_lm_eval(tmp_path, index="class TaskIndex: pass\n")
    done = run("import lm_eval.tasks._index as index; print(index.TaskIndex)", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "lm-eval-genpoe cannot register with this lm-eval" in done.stderr


def start(code: str, *paths: Path) -> subprocess.CompletedProcess[str]:
    """Run ``code`` after the start-up file in an interpreter that sees only ``paths`` and the standard library."""
    places = [str(path) for path in (*paths, STARTUP.parent)]
    begin = f"import sys\nsys.path += {places!r}\nbefore = set(sys.modules)\n{STARTUP.read_text()}\n"
    command = [sys.executable, "-I", "-S", "-c", begin + code]  # -S: no site
    return subprocess.run(command, capture_output=True, text=True)


def test_harmless_without_lm_eval() -> None:
    code = """
try:
    import lm_eval.models
except ModuleNotFoundError as error:
    assert error.name == "lm_eval", error
else:
    raise AssertionError("lm_eval is here")
"""
    done = start(code, REPOSITORY)
    assert (done.returncode, done.stderr) == (0, "")


def test_it_imports_nothing_but_itself() -> None:
    done = start("print(*sorted(set(sys.modules) - before))", REPOSITORY)
    assert done.stdout.split() == ["lm_eval_genpoe_autoload"], done.stderr


def test_the_checkout_that_is_first_on_the_path_registers(tmp_path: Path) -> None:
    write_lm_eval(tmp_path)
    other = tmp_path / "genpoe_plugin"
    other.mkdir()
    (other / "__init__.py").touch()
    (other / "registration.py").write_text("def install(): print('the other')")
    # It becomes first only after the interpreter has started.
    done = start(f"sys.path.insert(0, {str(tmp_path)!r})\nimport json, lm_eval, lm_eval.models", REPOSITORY)
    assert (done.stdout, done.stderr) == ("the other\n", "")


def test_lm_eval_without_this_package(tmp_path: Path) -> None:
    write_lm_eval(tmp_path)
    done = start("import lm_eval; print(lm_eval.__name__)", tmp_path)
    assert (done.returncode, done.stdout) == (0, "lm_eval\n")
    assert "lm-eval-genpoe cannot register with this lm-eval" in done.stderr


def test_an_lm_eval_that_is_too_new_is_named(tmp_path: Path) -> None:
    write_lm_eval(tmp_path)
    facts = tmp_path / "lm_eval-0.5.0.dev2.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: lm_eval\nVersion: 0.5.0.dev2\n")
    done = run(f"import json\n{LIST_MODELS}", tmp_path)
    assert "needs lm-eval below 0.5, this is 0.5.0.dev2: pip install 'lm-eval<0.5'" in done.stderr
    assert json.loads(done.stdout) == {"hf": "a:B", **OURS}


def test_both_start_up_files_call_the_same_function() -> None:
    module, function = STARTUP.with_suffix(".start").read_text().strip().split(":")
    assert STARTUP.read_text().strip() == f"import {module}; {module}.{function}()"


@pytest.mark.parametrize("off", ["0", "1"])
def test_the_real_lm_eval(off: str) -> None:
    code = """
import lm_eval.models, lm_eval.tasks._index as index
from lm_eval.api.registry import model_registry
print(json.dumps([list(model_registry), "build_with_ours" in index.TaskIndex.build.__name__]))
"""
    models, patched = output(code, GENPOE_NO_AUTOLOAD=off)  # type: ignore[misc]
    assert {"hf", "vllm", "dummy"} < set(models)
    assert ("genpoe" in models) == patched == (off == "0")


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize(
    ("error", "line"),
    [
        (KeyboardInterrupt(), "interrupted"),
        (OSError(errno.ENOSPC, "Full", "results"), "error: results: cannot be written (Full)"),
        (sqlite3.OperationalError("disk full"), "error: --use_cache: cannot be read or written (disk full)"),
        (OSError(errno.ENOENT, "no such file"), None),
        (ZeroDivisionError("a bug"), None),
    ],
    ids=repr,
)
def test_an_end_of_a_run_of_ours_that_is_one_line(error, line, ours, monkeypatch, capsys) -> None:
    """Those of other models keep their traceback."""
    others: list[type[BaseException]] = []
    ended: list[bool] = []
    monkeypatch.setattr(interrupts, "end_by_signal", lambda: ended.append(True))
    monkeypatch.setattr(sys, "excepthook", lambda kind, *_: others.append(kind))
    monkeypatch.setitem(sys.modules, "__main__", ModuleType("__main__"))
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    monkeypatch.setattr(sys, "argv", ["/usr/bin/lm_eval"])
    for module in (target.partition(":")[0] for target in OURS.values()):
        monkeypatch.delitem(sys.modules, module, raising=False)
    if ours:
        monkeypatch.setitem(sys.modules, "genpoe_plugin.lm.hf", ModuleType("hf"))
    registration.errors_in_one_line()
    sys.excepthook(type(error), error, None)
    expected = ([], f"{line}\n") if ours and line else ([type(error)], "")
    assert (others, capsys.readouterr().err) == expected
    assert bool(ended) == (ours and isinstance(error, KeyboardInterrupt))
