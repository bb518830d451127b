from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer, models, pre_tokenizers

from genpoe_plugin.retrieval.index import PassageIndex
from genpoe_plugin.retrieval.retriever import Retriever
from train_cli.main import main

WORDS = ["rossini", "barber", "curie", "radium", "polonium", "fox"]
TSV = "id\ttext\ttitle\n1\trossini barber\tbarber\n2\tcurie radium polonium\tcurie\n3\tfox\t\n"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest of real encoders: a vector for each word."""
    directory = tmp_path_factory.mktemp("encoder")
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["[UNK]", *WORDS])}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    SentenceTransformer(modules=[StaticEmbedding(words, embedding_dim=16)], device="cpu").save(str(directory))
    return directory


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def build(text: str, directory: Path, *arguments: object) -> Result:
    (directory / "passages.tsv").write_text(text)
    return run("index", "build", "--passages", directory / "passages.tsv", "--out", directory / "index", *arguments)


def test_build_and_info(encoder: Path, tmp_path: Path) -> None:
    result = build(TSV, tmp_path, "--encoder", encoder)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{tmp_path / 'index'}: 3 passages, 16 dimensions, Flat\n"
    found = Retriever.load(tmp_path / "index").retrieve(["radium", "fox", "barber"], 1)
    assert [items[0].passage.id for items in found] == ["2", "3", "1"]

    info = run("index", "info", tmp_path / "index")
    assert info.exit_code == 0
    lines = dict(line.split(maxsplit=1) for line in info.stdout.splitlines())
    assert lines["passages"] == "3" and lines["dimensions"] == "16" and lines["encoder"] == str(encoder)
    assert "verified" not in info.stdout
    assert run("index", "info", tmp_path / "index", "--verify").stdout.count("verified") == 2


def test_factory(encoder: Path, tmp_path: Path) -> None:
    assert build(TSV, tmp_path, "--encoder", encoder, "--factory", "SQfp16").exit_code == 0
    assert "SQfp16" in run("index", "info", tmp_path / "index").stdout
    _, rows = PassageIndex.load(tmp_path / "index").search(np.ones((1, 16)), 3)
    assert sorted(rows[0]) == [0, 1, 2]


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        (TSV + "4\tno title\n", [], "passages.tsv:5: 2 fields"),
        (TSV + "4\t \tfox\n", [], "passages.tsv:5: passage '4' has no text"),
        (TSV + "2\tfox again\t\n", [], "passages 2 and 4 both have the id '2'"),
        ("id\ttext\ttitle\n", [], "no passages"),
        (TSV, ["--factory", "Flt"], "factory 'Flt'"),
        (TSV, ["--encoder", "no-such/encoder"], "no-such/encoder: "),
        (TSV, ["--device", "abacus"], "abacus"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    encoder: Path, tmp_path: Path, text: str, arguments: list[str], message: str
) -> None:
    result = build(text, tmp_path, "--encoder", encoder, *arguments)
    assert result.exit_code == 2
    last = result.stderr.splitlines()[-1]  # after the progress bar
    assert last.startswith("error: ") and message in last and "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["passages.tsv"]


def test_info_of_something_else(encoder: Path, tmp_path: Path) -> None:
    build(TSV, tmp_path, "--encoder", encoder)
    (tmp_path / "index" / "index.faiss").write_bytes(b"")
    for directory, message in [(tmp_path, "not an index"), (tmp_path / "index", "index.faiss: 0 bytes where")]:
        result = run("index", "info", directory)
        assert result.exit_code == 2
        assert result.stderr.startswith("error: ") and message in result.stderr and result.stderr.count("\n") == 1
