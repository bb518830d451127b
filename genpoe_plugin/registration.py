"""Register our models and tasks with the stock ``lm_eval`` command.

A version of lm-eval that reads entry points (``lm_eval.models``, ``lm_eval.tasks``; see pyproject.toml) does not need
this module. Version 0.4.13, the newest release, does not read them. Therefore the wheel contains a start-up file
(``startup/*.pth``, and ``*.start`` for Python 3.15) that waits for ``import lm_eval`` and then calls `install`, which
only adds an import hook. When lm-eval imports its module

- ``lm_eval.models``, the hook registers the names of our models; the model classes are imported on first use;
- ``lm_eval.tasks._index``, the hook adds our task folder directly after the built-in one, so ``--include_path`` still
  has priority.

It skips models or tasks that lm-eval finds by itself. ``GENPOE_NO_AUTOLOAD=1`` turns the start-up file off. If
registration fails, there is only a warning, and lm-eval works without our models and tasks.
"""

from __future__ import annotations

import errno
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

MODELS = {"genpoe": "genpoe_plugin.lm.hf:GenPoELM", "genpoe-vllm": "genpoe_plugin.lm.vllm:GenPoEVLLM"}
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)
_MODEL_MODULES = {target.partition(":")[0] for target in MODELS.values()}


def install() -> None:
    """Register with lm-eval when it is imported, or now if it is already imported."""
    if os.environ.get("GENPOE_NO_AUTOLOAD", "0") not in ("", "0"):
        return
    if any(isinstance(finder, _Hook) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Hook())
    for name, register in _REGISTER.items():
        if name in sys.modules:
            _safely(register, sys.modules[name])


def task_folder() -> Path:
    """The folder of our tasks: inside the installed package, or beside the package in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "tasks"
    return installed if installed.is_dir() else package.parent / "tasks"


def errors_in_one_line() -> None:
    """Make lm-eval's command print an uncaught `InputError` as one line instead of a traceback.

    In runs of our models, also Ctrl-C and errors in writing, such as a full disk. Other programs and other errors keep
    their tracebacks. The exit status is 1, as for any exception, or 130.
    """
    main = getattr(sys.modules.get("__main__"), "__spec__", None)
    program = main.name if main is not None else os.path.basename(sys.argv[0] if sys.argv else "")
    if program.partition(".")[0] not in ("lm_eval", "lm-eval") or getattr(sys.excepthook, "of_genpoe", False):
        return
    previous_hook = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        errors = sys.modules.get("genpoe_plugin.errors")
        if errors is not None and isinstance(error, errors.InputError):
            print("error:", " ".join(str(error).splitlines()), file=sys.stderr)
        elif _MODEL_MODULES.isdisjoint(sys.modules):
            previous_hook(kind, error, trace)
        elif issubclass(kind, KeyboardInterrupt):
            print("interrupted", file=sys.stderr)
            from genpoe_plugin.interrupts import end_by_signal

            end_by_signal()
        elif isinstance(error, OSError) and error.errno in _UNWRITABLE:
            print(f"error: {error.filename or 'output'}: cannot be written ({error.strerror})", file=sys.stderr)
        elif kind.__module__ == "sqlite3" and kind.__name__ == "OperationalError":
            print(f"error: --use_cache: cannot be read or written ({error})", file=sys.stderr)
        else:
            previous_hook(kind, error, trace)

    hook.of_genpoe = True  # type: ignore[attr-defined]
    sys.excepthook = hook


def _check_version() -> None:
    """Warn about lm-eval 0.5, whose development versions have another interface for tasks and metrics."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        installed = version("lm_eval")
    except PackageNotFoundError:  # a checkout on the path
        return
    if [int(part) for part in installed.split(".")[:2]] >= [0, 5]:
        message = f"lm-eval-genpoe needs lm-eval below 0.5, this is {installed}: pip install 'lm-eval<0.5'"
        warnings.warn(message, stacklevel=2)


def _register_models(models: ModuleType) -> None:
    errors_in_one_line()
    _check_version()
    from lm_eval.api import registry

    if hasattr(registry, "load_plugins"):  # this lm-eval reads entry points
        return
    for name, target in MODELS.items():
        if name not in registry.model_registry:
            registry.model_registry.register(name, target=target)


def _register_tasks(index: ModuleType) -> None:
    build = index.TaskIndex.build
    built_in = Path(str(index.__file__)).parent

    def build_with_ours(paths: Iterable[Path], **options: Any) -> Any:
        paths, our_tasks = list(paths), task_folder()
        if built_in in paths and our_tasks not in paths:
            paths.insert(paths.index(built_in) + 1, our_tasks)
        return build(paths, **options)

    index.TaskIndex.build = staticmethod(build_with_ours)


_REGISTER = {"lm_eval.models": _register_models, "lm_eval.tasks._index": _register_tasks}


def _safely(register: Callable[[ModuleType], None], module: ModuleType) -> None:
    """Call ``register`` with a module of lm-eval; an exception becomes a warning."""
    try:
        register(module)
    except Exception as error:
        warnings.warn(f"lm-eval-genpoe cannot register with this lm-eval: {error!r}", stacklevel=2)


class _Hook:
    """An import finder that makes the loaders of lm-eval's two modules call a function of `_REGISTER` after loading."""

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
    """Make a loader call ``register`` with each module that it has loaded."""
    original = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        original(module)
        _safely(register, module)

    loader.exec_module = exec_module
