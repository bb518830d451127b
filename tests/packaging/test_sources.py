"""What must not be anywhere in the files that users get."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
FILES = [
    path
    for folder in ("genpoe_plugin", "tasks", "train_cli")
    for path in sorted((REPOSITORY / folder).rglob("*"))
    if path.is_file() and "__pycache__" not in path.parts
]
PERSONAL = re.compile(rb"(?<![\w.])/(?:home|Users|root|mnt|work|workspace)/\w|\b[A-Z]:\\+Users")
PICKLING = {
    *("pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle", "sqlitedict"),
    *("torch.load", "torch.save", "torch.jit.load", "torch.package", "read_pickle", "pandas.read_pickle"),
    *("yaml.load", "yaml.full_load", "yaml.unsafe_load", "yaml.Loader", "yaml.UnsafeLoader", "yaml.FullLoader"),
    *("eval", "exec", "os.system", "os.popen", "subprocess.getoutput", "shell=True"),
}
"""What may run code from a file or a text."""


def test_no_path_of_somebodys_machine() -> None:
    """Research code: data, models and results under its authors' home folders. Models' own files are looked at too."""
    for path in ("/home/jane/data", "'/Users/jane'", "C:\\Users\\jane", "open(/mnt/nq)"):
        assert PERSONAL.search(path.encode())
    files = [*FILES, REPOSITORY / "pyproject.toml", REPOSITORY / "Makefile"]
    assert len(files) > 60
    assert [str(path) for path in files if PERSONAL.search(path.read_bytes())] == []


def names(source: str) -> Iterator[str]:
    """Imports, dotted names, functions called by a name, and keywords with constants, such as ``allow_pickle=True``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield node.func.id
        elif isinstance(node, ast.keyword) and isinstance(node.value, ast.Constant):
            yield f"{node.arg}={node.value.value}"
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names))


def test_nothing_is_pickled() -> None:
    """Research code: `torch.save` and `torch.load`; ours are safetensors and JSON."""
    forbidden = {*PICKLING, "allow_pickle=True", "weights_only=False"}
    for source in (
        "import pickle",
        "from torch import load",
        "x = torch.load(y)",
        "np.load(x, allow_pickle=True)",
        "eval(x)",
    ):
        assert {*names(source)} & forbidden
    sources = [path for path in FILES if path.suffix == ".py"]
    found = {str(path): {*names(path.read_text(encoding="utf-8"))} & forbidden for path in sources}
    assert {path: pickling for path, pickling in found.items() if pickling} == {}


EDGES = ("lm", "vllm_engine", "registration", "startup")
"""Folders and modules of genpoe_plugin that may import lm_eval and vllm."""


def imported(path: Path) -> Iterator[str]:
    """What a module imports at run time, wherever in it, by full names."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part(name: str) -> str:
    """The folder of genpoe_plugin, or the module beside them, that a full name is in."""
    return name.removeprefix("genpoe_plugin.").partition(".")[0]


def test_the_core_imports_no_framework_around_it() -> None:
    outer = {"lm_eval", "click", "vllm"}
    found = {}
    for path in (REPOSITORY / "genpoe_plugin").rglob("*.py"):
        where = path.relative_to(REPOSITORY / "genpoe_plugin").parts[0].removesuffix(".py")
        names = {name.partition(".")[0] for name in imported(path)} & outer
        if names and where not in EDGES:
            found[str(path)] = names
    assert found == {}
    assert outer & {name.partition(".")[0] for name in imported(REPOSITORY / "genpoe_plugin/lm/hf.py")}


def test_folders_import_one_another_in_one_direction() -> None:
    uses: dict[str, set[str]] = {}
    for path in (REPOSITORY / "genpoe_plugin").rglob("*.py"):
        where = path.relative_to(REPOSITORY / "genpoe_plugin").parts[0].removesuffix(".py")
        names = {part(name) for name in imported(path) if name.startswith("genpoe_plugin.")}
        uses.setdefault(where, set()).update(names - {where, "__version__"})
    assert {"data", "experts", "retrieval", "selection", "training"} <= uses.keys()
    while leaves := [where for where in uses if not uses[where] & uses.keys()]:
        for where in leaves:
            del uses[where]
    assert uses == {}, "these are in a cycle, or above one"
