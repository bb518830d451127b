"""GGUF files, as far as transformers reads them: what has to be there, and what its reader leaves out."""

from __future__ import annotations

import mmap
from importlib.util import find_spec
from pathlib import Path

from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase
from transformers.utils import cached_file

from genpoe_plugin.errors import InputError

_ADDS_BOS = b"tokenizer.ggml.add_bos_token"


def check_gguf(name: str, gguf_file: str | None, subfolder: str = "") -> None:
    """Refuse an LLM whose weights are to come from a GGUF file that cannot be read here; ``None`` is no such file.

    Raises:
        InputError: the package ``gguf`` is missing, or the directory ``name`` has no such file.
    """
    if gguf_file is None:
        return
    need_gguf_package(gguf_file)
    if Path(name).is_dir() and not (path := Path(name, subfolder, gguf_file)).is_file():
        raise InputError(f"{path}: no such file; a GGUF file is named by its place in the LLM's directory")


def need_gguf_package(gguf_file: str) -> None:
    """Raise an ``InputError`` if the package that reads ``gguf_file`` is missing."""
    if find_spec("gguf") is None:
        raise InputError(f"{gguf_file}: a GGUF file needs the package gguf; pip install 'lm-eval-genpoe[gguf]'")


def begin_as_stored(tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Have the tokenizer of a GGUF file begin every text with BOS if the file says so, which its reader passes over.

    Without it Gemma's answers are nonsense.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    bos, number = tokenizer.bos_token, tokenizer.bos_token_id
    if backend is None or bos is None or tokenizer("a")["input_ids"][:1] == [number]:
        return
    if _adds_bos(path):
        backend.post_processor = TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, number)]
        )


def gguf_path(name: str, gguf_file: str, *, revision: str | None = None, subfolder: str = "") -> Path:
    """Where a GGUF file is on this machine, once it has been loaded from a directory or the hub."""
    return Path(str(cached_file(name, gguf_file, revision=revision, subfolder=subfolder)))


def _adds_bos(path: Path) -> bool:
    # Found by its name, for the package's own reader goes through the vocabulary first, which takes half a minute.
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        at = content.find(_ADDS_BOS)
        # The name, four bytes for the type, one for the value.
        return at >= 0 and content[at + len(_ADDS_BOS) + 4] == 1
