"""GGUF files in transformers: checks before loading, and a setting that its reader ignores."""

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
    """Check that a GGUF file can be read; ``None`` means that the LLM is not in a GGUF file.

    Args:
        name: directory or hub name of the LLM.
        gguf_file: name of the file in it.
        subfolder: subfolder of the file.

    Raises:
        InputError: the package ``gguf`` is missing, or the directory ``name`` has no such file.
    """
    if gguf_file is None:
        return
    need_gguf_package(gguf_file)
    if Path(name).is_dir() and not (path := Path(name, subfolder, gguf_file)).is_file():
        raise InputError(f"{path}: no such file; give the GGUF file's path relative to the LLM's directory")


def need_gguf_package(gguf_file: str) -> None:
    """Raise an `InputError` if the package ``gguf`` is missing."""
    if find_spec("gguf") is None:
        raise InputError(f"{gguf_file}: a GGUF file needs the package gguf; pip install 'lm-eval-genpoe[gguf]'")


def begin_as_stored(tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Make the tokenizer of a GGUF file begin every text with BOS if the file says so.

    transformers' reader ignores this setting; without BOS, Gemma's answers are nonsense.
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
    """The local path of a GGUF file that has been loaded from a directory or the hub."""
    return Path(str(cached_file(name, gguf_file, revision=revision, subfolder=subfolder)))


def _adds_bos(path: Path) -> bool:
    # A text search for the key: the package's own reader parses the vocabulary first, which takes half a minute.
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        at = content.find(_ADDS_BOS)
        # The key is followed by four bytes for the type and one for the value.
        return at >= 0 and content[at + len(_ADDS_BOS) + 4] == 1
