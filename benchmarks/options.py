"""What a benchmark is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Options:
    """What a benchmark is asked for.

    Attributes:
        quick: a size for a few minutes.
        out: a folder that keeps what is made on the way, and is used again.
    """

    quick: bool = False
    out: Path | None = None
