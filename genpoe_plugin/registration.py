"""Making the stock ``lm_eval`` command find our model and tasks.

An lm-eval that discovers entry points (``lm_eval.models``, ``lm_eval.tasks``; see pyproject.toml) needs none of this.
Version 0.4.13, the newest release, does not, so the wheel carries a start-up file (``startup/*.pth``, and ``*.start``
for Python 3.15) that waits for ``import lm_eval`` and then calls ``install``. That puts one import hook in place and
nothing else. When lm-eval imports its own

- ``lm_eval.models``: the model name is registered, as a placeholder, unless that lm-eval loads plugins by itself;
- ``lm_eval.tasks._index``: our task folder is indexed right after the built-in one, so that ``--include_path`` still
  wins, unless that lm-eval has found the folder by itself.

``GENPOE_NO_AUTOLOAD=1`` turns it off. What goes wrong here is a warning, never a broken lm-eval.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

MODELS = {"genpoe": "genpoe_plugin.lm.hf:GenPoELM", "genpoe-vllm": "genpoe_plugin.lm.vllm:GenPoEVLLM"}


def install() -> None:
    """Register with lm-eval as soon as it is imported, or now if it already is."""
    if os.environ.get("GENPOE_NO_AUTOLOAD", "0") not in ("", "0"):
        return
    if any(isinstance(finder, _Hook) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Hook())
    for name, register in _REGISTER.items():
        if name in sys.modules:
            _safely(register, sys.modules[name])


def task_folder() -> Path:
    """The folder of our task YAMLs: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "tasks"
    return installed if installed.is_dir() else package.parent / "tasks"


def errors_in_one_line() -> None:
    """Have a program of lm-eval end in one line, without a traceback, where an `InputError` ends it.

    Other programs, and other errors, keep their tracebacks. The status is that of any exception, 1.
    """
    main = getattr(sys.modules.get("__main__"), "__spec__", None)
    program = main.name if main is not None else os.path.basename(sys.argv[0] if sys.argv else "")
    if program.partition(".")[0] not in ("lm_eval", "lm-eval") or getattr(sys.excepthook, "of_genpoe", False):
        return
    earlier = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        errors = sys.modules.get("genpoe_plugin.errors")
        if errors is not None and isinstance(error, errors.InputError):
            print("error:", " ".join(str(error).splitlines()), file=sys.stderr)
        else:
            earlier(kind, error, trace)

    hook.of_genpoe = True  # type: ignore[attr-defined]
    sys.excepthook = hook


def _check_version() -> None:
    """Warn of lm-eval 0.5, whose development versions have tasks and metrics of another shape."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        found = version("lm_eval")
    except PackageNotFoundError:  # a checkout on the path
        return
    if [int(part) for part in found.split(".")[:2]] >= [0, 5]:
        message = f"lm-eval-genpoe needs lm-eval below 0.5, this is {found}: pip install 'lm-eval<0.5'"
        warnings.warn(message, stacklevel=2)


def _register_models(models: ModuleType) -> None:
    errors_in_one_line()
    _check_version()
    from lm_eval.api import registry

    if hasattr(registry, "load_plugins"):
        return
    for name, target in MODELS.items():
        if name not in registry.model_registry:
            registry.model_registry.register(name, target=target)


def _register_tasks(index: ModuleType) -> None:
    build = index.TaskIndex.build
    built_in = Path(str(index.__file__)).parent

    def build_with_ours(paths: Iterable[Path], **options: Any) -> Any:
        paths, ours = list(paths), task_folder()
        if built_in in paths and ours not in paths:
            paths.insert(paths.index(built_in) + 1, ours)
        return build(paths, **options)

    index.TaskIndex.build = staticmethod(build_with_ours)


_REGISTER = {"lm_eval.models": _register_models, "lm_eval.tasks._index": _register_tasks}


def _safely(register: Callable[[ModuleType], None], module: ModuleType) -> None:
    try:
        register(module)
    except Exception as error:
        warnings.warn(f"lm-eval-genpoe cannot register with this lm-eval: {error!r}", stacklevel=2)


class _Hook:
    """A finder that finds nothing itself; it has the real loader of lm-eval's two modules call us afterwards."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        register = _REGISTER.get(name)
        if register is None:
            return None
        for finder in sys.meta_path:
            if finder is not self and (spec := finder.find_spec(name, path, target)) is not None:
                if spec.loader is not None:
                    _call_after(spec.loader, register)
                return spec
        return None


def _call_after(loader: Any, register: Callable[[ModuleType], None]) -> None:
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        execute(module)
        _safely(register, module)

    loader.exec_module = exec_module
