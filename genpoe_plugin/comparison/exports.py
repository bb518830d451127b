"""Write a comparison in the formats of other tools; the name of the target decides the format."""

from __future__ import annotations

from pathlib import Path

from genpoe_plugin.comparison.every_eval_ever import write_records
from genpoe_plugin.comparison.latex import latex
from genpoe_plugin.comparison.leaderboard import Comparison
from genpoe_plugin.comparison.lm_eval_table import lm_eval_tables
from genpoe_plugin.errors import InputError
from genpoe_plugin.files import atomic_file, writing

_TEXTS = {".tex": latex, ".md": lm_eval_tables}


def check_target(path: Path) -> None:
    """Check that there is a format for a target.

    Raises:
        InputError: there is none.
    """
    if path.suffix and path.suffix not in _TEXTS:
        raise InputError(
            f"--export {path}: give FILE.tex (LaTeX), FILE.md (lm_eval's tables) or a folder without a dot in its name"
            " (Every Eval Ever)"
        )


def export(comparison: Comparison, path: Path) -> list[Path]:
    """Write a comparison to ``path``, and return the paths of the files.

    Raises:
        InputError: there is no format for ``path``, or a file cannot be written.
    """
    check_target(path)
    text = _TEXTS.get(path.suffix)
    if text is None:
        with writing(path, "no file is incomplete"):
            return write_records(comparison, path)
    with writing(path.parent, "no file is incomplete"), atomic_file(path) as temporary:
        temporary.write_text(text(comparison), encoding="utf-8")
    return [path]
