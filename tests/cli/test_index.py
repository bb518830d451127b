from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer, models, pre_tokenizers

from genpoe_plugin.indexing import encoding
from genpoe_plugin.indexing.shards import Shards
from genpoe_plugin.retrieval.dense import DenseRetriever
from genpoe_plugin.retrieval.index import PassageIndex
from genpoe_plugin.retrieval.loading import load_retriever
from train_cli.index import Size
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
    found = DenseRetriever.load(tmp_path / "index").retrieve(["radium", "fox", "barber"], 1)
    assert [items[0].passage.id for items in found] == ["2", "3", "1"]

    info = run("index", "info", tmp_path / "index")
    assert info.exit_code == 0
    lines = dict(line.split(maxsplit=1) for line in info.stdout.splitlines())
    assert lines["passages"] == "3" and lines["dimensions"] == "16" and lines["encoder"] == str(encoder)
    assert "verified" not in info.stdout
    assert run("index", "info", tmp_path / "index", "--verify").stdout.count("verified") == 2


def test_shards_are_encoded_once_for_any_index(encoder: Path, tmp_path: Path) -> None:
    (tmp_path / "passages.tsv").write_text(TSV)
    options = ["--passages", tmp_path / "passages.tsv", "--encoder", encoder, "--shard-size", 2]
    result = run("index", "encode", *options, "--out", tmp_path / "shards")
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{tmp_path / 'shards'}: 3 passages, 16 dimensions, 2 shards\n"
    assert not Shards.open(tmp_path / "shards").missing()
    for factory in ("Flat", "SQ8"):
        result = run(
            "index", "build", "--shards", tmp_path / "shards", "--out", tmp_path / factory, "--factory", factory
        )
        assert result.exit_code == 0, result.output
        found = DenseRetriever.load(tmp_path / factory).retrieve(["radium", "fox", "barber"], 1)
        assert [items[0].passage.id for items in found] == ["2", "3", "1"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Flat", "SQ8", "passages.tsv", "shards"]

    shutil.rmtree(tmp_path / "shards")
    result = run("index", "build", *options, "--shards", tmp_path / "shards", "--out", tmp_path / "again")
    assert result.exit_code == 0 and not Shards.open(tmp_path / "shards").missing()
    shutil.copy(tmp_path / "shards" / "shards.json", tmp_path / "part.json")
    (tmp_path / "part").mkdir()
    (tmp_path / "part.json").rename(tmp_path / "part" / "shards.json")
    result = run("index", "build", "--shards", tmp_path / "part", "--out", tmp_path / "other")
    assert result.exit_code == 2 and "part: 2 of 2 shards are missing; rerun `genpoe index encode`" in result.stderr


def test_only_the_first_of_many_processes_builds(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    result = build(TSV, tmp_path, "--encoder", encoder)
    assert result.exit_code == 0 and result.stdout == ""
    assert not (tmp_path / "index").exists() and not Shards.open(tmp_path / "index.building" / "shards").missing()
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    assert build(TSV, tmp_path, "--encoder", encoder).exit_code == 0
    assert len(PassageIndex.load(tmp_path / "index")) == 3


def test_prompts_and_dimensions_are_kept(encoder: Path, tmp_path: Path) -> None:
    options = ["--question-prompt", "fox ", "--passage-prompt", "curie ", "--dimensions", 5]
    result = build(TSV, tmp_path, "--encoder", encoder, "--shards", tmp_path / "shards", *options)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{tmp_path / 'index'}: 3 passages, 5 dimensions, Flat\n"
    vectors = SentenceTransformer(str(encoder), device="cpu").encode(
        ["fox radium", "curie barber: rossini barber", "curie curie: curie radium polonium", "curie fox"]
    )[:, :5]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    (found,) = DenseRetriever.load(tmp_path / "index").retrieve(["radium"], 3)
    scores = {item.passage.id: item.score for item in found}
    np.testing.assert_allclose([scores[name] for name in "123"], vectors[1:] @ vectors[0], atol=2e-3)  # float16
    info = run("index", "info", tmp_path / "index").stdout.splitlines()
    assert "question     'fox ' before it" in info and "passage      'curie ' before it" in info
    assert "pooling      first 5 dimensions, normalised" in info
    # Tuning encodes its questions in the same way, and other options are refused.
    (tmp_path / "questions.tsv").write_text("fox\t['x']\n")
    arguments = ["--shards", tmp_path / "shards", "--queries", tmp_path / "questions.tsv"]
    result = run("index", "tune", tmp_path / "index", *arguments)
    assert result.exit_code == 0, result.output
    result = build(TSV, tmp_path, "--encoder", encoder, "--shards", tmp_path / "shards")
    assert result.exit_code == 2 and "question prompt 'fox ', passage prompt 'curie ', 5 dimensions" in result.stderr


def test_the_same_command_does_not_build_again(encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "passages.tsv").write_text(TSV)
    options = ["--passages", tmp_path / "passages.tsv", "--encoder", encoder, "--out", tmp_path / "index"]
    assert run("index", "build", *options).exit_code == 0
    # What a process leaves that is killed just after the index is complete.
    (tmp_path / ".index.lock").touch()
    (tmp_path / "index.building").mkdir()
    with monkeypatch.context() as patched:
        patched.setattr(encoding, "encode_shards", lambda *a, **o: pytest.fail("encoded again"))
        again = run("index", "build", *options)
    assert again.exit_code == 0 and "already built" in again.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index", "passages.tsv"]
    assert run("index", "build", *options, "--factory", "SQ8").stdout.endswith("SQ8, recall@3 1.000\n")


def test_index_type_is_chosen_and_tuned(encoder: Path, tmp_path: Path) -> None:
    result = build(TSV, tmp_path, "--encoder", encoder, "--memory", "2.5 GB")
    assert result.exit_code == 0
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Flat: ")]
    assert "3 passages (dimension 16), exact search: 0.0 GB" in line

    rng = random.Random(0)
    text = "".join(f"{i}\t{' '.join(rng.choices(WORDS, k=9))}\t\n" for i in range(400))
    (tmp_path / "questions.tsv").write_text("".join(f"{word} {other}\t['x']\n" for word in WORDS for other in WORDS))
    questions = ["--queries", tmp_path / "questions.tsv"]
    options = ["--encoder", encoder, "--factory", "IVF8,SQ8", "--shards", tmp_path / "shards"]
    result = build(text, tmp_path, *options, *questions, "--recall", 0.4)
    assert result.exit_code == 0, result.output
    info = run("index", "info", tmp_path / "index").stdout
    first = PassageIndex.load(tmp_path / "index").manifest["search"]
    assert f"search       nprobe {first['parameters']['nprobe']:g}, recall@20 {first['recall']:.3f}" in info
    assert f"measured by  {tmp_path / 'questions.tsv'}" in info
    result = run("index", "tune", tmp_path / "index", "--shards", tmp_path / "shards", *questions, "--recall", 0.99)
    assert result.exit_code == 0, result.output
    second = PassageIndex.load(tmp_path / "index").manifest["search"]
    assert second["parameters"]["nprobe"] > first["parameters"]["nprobe"] and second["recall"] >= 0.99
    assert result.stdout == f"{tmp_path / 'index'}: IVF8,SQ8, recall@20 {second['recall']:.3f}\n"


def test_questions_of_another_encoder_are_refused(encoder: Path, tmp_path: Path) -> None:
    assert build(TSV, tmp_path, "--encoder", encoder, "--shards", tmp_path / "shards").exit_code == 0
    other = tmp_path / "other-encoder"
    words = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    SentenceTransformer(modules=[StaticEmbedding(words, embedding_dim=16)], device="cpu").save(str(other))
    (tmp_path / "questions.tsv").write_text("fox\t['x']\n")
    arguments = ["--shards", tmp_path / "shards", "--queries", tmp_path / "questions.tsv", "--encoder", other]
    result = run("index", "tune", tmp_path / "index", *arguments)
    assert result.exit_code == 2
    assert str(encoder) in result.stderr and str(other) in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("text", "size"), [("16GB", 16 * 10**9), ("16gib", 2**34), ("1.5 TB", 15 * 10**11), ("4096", 4096)]
)
def test_sizes(text: str, size: int) -> None:
    assert Size().convert(text, None, None) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "16 elephants", "1e3", "nanGB"])
def test_what_is_no_size(text: str) -> None:
    result = run("index", "build", "--out", "x", "--memory", text)
    assert result.exit_code == 2 and "is not a size such as 16GB" in result.stderr


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
        (TSV + "2\tfox again\t\n", [], "passages.tsv:5: id '2' is also the id of"),
        ("id\ttext\ttitle\n", [], "no passages"),
        (TSV, ["--factory", "Flt"], "factory 'Flt'"),
        (TSV, ["--encoder", "no-such/encoder"], "no-such/encoder: "),
        (TSV, ["--device", "abacus"], "abacus"),
        (TSV, ["--dimensions", "17"], "its vectors have 16 dimensions, not 17; give fewer"),
        (TSV, ["--encoder", "a,b", "--question-prompt", "q"], "a,b: a DPR pair has neither prompts nor dimensions"),
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


def test_too_few_passages_keep_what_is_encoded(encoder: Path, tmp_path: Path) -> None:
    result = build(TSV, tmp_path, "--encoder", encoder, "--factory", "IVF64,Flat")
    assert result.exit_code == 2 and "64 centroids need more than 3 passages" in result.stderr.splitlines()[-1]
    assert not Shards.open(tmp_path / "index.building" / "shards").missing()
    assert build(TSV, tmp_path, "--encoder", encoder).exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index", "passages.tsv"]


def test_what_to_build_of_is_needed(encoder: Path, tmp_path: Path) -> None:
    for arguments, message in [
        ([], "give --passages and --encoder, or --shards"),
        (["--passages", tmp_path / "x.tsv"], "--passages needs --encoder"),
        (["--shards", tmp_path / "none"], "not a folder of shards"),
        (["--shards", tmp_path / "none", "--dimensions", 5], "--dimensions belong to the encoding; give --passages"),
        (["--shards", tmp_path / "none", "--passage-prompt", ""], "belong to the encoding; give --passages"),
    ]:
        result = run("index", "build", "--out", tmp_path / "index", *arguments)
        assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1


def test_info_of_something_else(encoder: Path, tmp_path: Path) -> None:
    build(TSV, tmp_path, "--encoder", encoder)
    (tmp_path / "index" / "index.faiss").write_bytes(b"")
    for directory, message in [(tmp_path, "not an index"), (tmp_path / "index", "index.faiss: 0 bytes where")]:
        result = run("index", "info", directory)
        assert result.exit_code == 2
        assert result.stderr.startswith("error: ") and message in result.stderr and result.stderr.count("\n") == 1


def test_an_index_of_words(tmp_path: Path) -> None:
    result = build(TSV, tmp_path, "--retriever", "bm25", "--k1", 0.9, "--b", 0.4)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{tmp_path / 'index'}: 3 passages, BM25, 6 words\n"
    found = load_retriever(tmp_path / "index").retrieve(["Radium?", "a fox", "barbers"], 1)
    assert [items[0].passage.id for items in found] == ["2", "3", "1"]

    info = run("index", "info", tmp_path / "index", "--verify")
    assert info.exit_code == 0, info.output
    lines = dict(line.split(maxsplit=1) for line in info.stdout.splitlines())
    assert lines["passages"] == "3" and lines["retriever"] == "BM25, k1 0.9, b 0.4"
    assert lines["words"] == "6, english, stemmed, without stop words"
    assert lines["fingerprint"] == load_retriever(tmp_path / "index").fingerprint
    assert info.stdout.count("verified") == len(json.loads((tmp_path / "index" / "index.json").read_text())["files"])

    options = ["--passages", tmp_path / "passages.tsv", "--out", tmp_path / "index", "--retriever", "bm25"]
    (tmp_path / ".index.lock").touch()  # of a process that was killed just after the index was complete
    assert "already built" in run("index", "build", *options, "--k1", 0.9, "--b", 0.4).stdout
    assert not (tmp_path / ".index.lock").exists()
    assert "already built" not in run("index", "build", *options).stdout
    assert "k1 1.5, b 0.75" in run("index", "info", tmp_path / "index").stdout
    result = run("index", "tune", tmp_path / "index", "--shards", tmp_path / "shards")
    assert result.exit_code == 2 and "an index of bm25, which has no vectors" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--retriever", "bm25", "--encoder", "x"], "--encoder: an option for --retriever dense, not for bm25"),
        (["--retriever", "bm25", "--shards", "x"], "--shards: an option for --retriever dense"),
        (["--retriever", "bm25", "--memory", "16GB"], "--memory: an option for --retriever dense"),
        (["--encoder", "x", "--k1", 1], "--k1: an option for --retriever bm25, not for dense; leave it out"),
    ],
)
def test_options_of_another_retriever_are_refused(tmp_path: Path, arguments: list[object], message: str) -> None:
    result = build(TSV, tmp_path, *arguments)
    assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1


def test_an_index_of_words_needs_passages(tmp_path: Path) -> None:
    result = run("index", "build", "--retriever", "bm25", "--out", tmp_path / "index")
    assert result.exit_code == 2 and "--retriever bm25 needs --passages" in result.stderr
    for text, message in [("1\tthe\t\n", "no words but stop words"), ("1\tfox\n", "passages.tsv:1: 2 fields")]:
        result = build(text, tmp_path, "--retriever", "bm25")
        last = result.stderr.splitlines()[-1]
        assert result.exit_code == 2 and last.startswith("error: ") and message in last
        assert [path.name for path in tmp_path.iterdir()] == ["passages.tsv"]
