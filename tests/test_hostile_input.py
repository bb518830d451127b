"""Files and names made to do harm: run code, fill the memory, write elsewhere, or put a script on a page."""

from __future__ import annotations

import io
import json
import os
import resource
import shlex
import struct
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from markdown_it import MarkdownIt
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.synthetic_results import documents, genpoe_facts, write_run
from genpoe_plugin.checkpoints.checkpoint import load_hypernetwork, save_hypernetwork
from genpoe_plugin.comparison import matrix as matrices
from genpoe_plugin.comparison.every_eval_ever import write_records
from genpoe_plugin.comparison.leaderboard import compare
from genpoe_plugin.comparison.markdown import markdown
from genpoe_plugin.comparison.matrix import read_matrix, run_matrix
from genpoe_plugin.comparison.page import page
from genpoe_plugin.comparison.terminal import show
from genpoe_plugin.data.parquet import read_parquet_rows
from genpoe_plugin.data.passages import Passage
from genpoe_plugin.errors import InputError, harmless
from genpoe_plugin.experts.config import HypernetworkConfig
from genpoe_plugin.experts.expert_files import ExpertFiles
from genpoe_plugin.experts.hypernetwork import Hypernetwork
from genpoe_plugin.files import atomic_file
from genpoe_plugin.indexing.encoding import index_passages
from genpoe_plugin.retrieval.encoder_options import EncoderOptions
from genpoe_plugin.retrieval.index import PassageIndex
from genpoe_plugin.retrieval.manifest import MANIFEST
from train_cli.main import main


def test_a_message_is_one_printable_line() -> None:
    error = InputError("data\x1b[2J\r\n.tsv:\u202e no \ud800 such\tfile, 東京 żółć")
    assert str(error) == r"data\x1b[2J\r\n.tsv:\u202e no \ud800 such\tfile, 東京 żółć"
    long = str(InputError(f"{'a' * 10**6}; delete it"))
    assert len(long) < 2100 and long.startswith("aaa") and long.endswith("; delete it")
    assert len(str(InputError("\t" * 10**6))) < 2100


def test_text_on_a_terminal_keeps_all_but_control_characters() -> None:
    kept = "100\xa0km 東京\u3000大学 👩\u200d💻 क्\u200cष"
    assert harmless(kept) == kept
    assert harmless("a\x1b[2J\u202eb\r\n\u2028") == r"a\x1b[2J\u202eb\r\n\u2028"


# Safetensors


@pytest.fixture
def checkpoint(
    tmp_path: Path, make_llm: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> tuple[Path, PreTrainedModel, PreTrainedTokenizerFast]:
    model = make_llm("llama")
    config = HypernetworkConfig.preset("memory", hidden_size=32, layers=[1], num_queries=4, core_size=4)
    save_hypernetwork(tmp_path / "checkpoint", Hypernetwork(config), model, tokenizer, {})
    return tmp_path / "checkpoint", model, tokenizer


def header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the header of a safetensors file."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    value = json.loads(content[8 : 8 + length])
    change(value)
    changed = json.dumps(value).encode()
    path.write_bytes(struct.pack("<Q", len(changed)) + changed + content[8 + length :])


def absurd(value: dict[str, Any]) -> None:
    name = next(name for name in value if name != "__metadata__")
    value[name]["shape"] = [1 << 40, 1 << 20]


def overlapping(value: dict[str, Any]) -> None:
    first, second = [name for name in value if name != "__metadata__"][:2]
    value[first]["data_offsets"] = value[second]["data_offsets"]


def other_type(value: dict[str, Any]) -> None:
    value[next(name for name in value if name != "__metadata__")]["dtype"] = "F8_E99"


@pytest.mark.parametrize("change", [absurd, overlapping, other_type])
def test_weights_with_a_wrong_header_are_refused(checkpoint: Any, change: Callable[[dict[str, Any]], None]) -> None:
    directory, model, tokenizer = checkpoint
    header(directory / "model.safetensors", change)
    with pytest.raises(InputError, match=r"model\.safetensors: damaged, or its shapes differ"):
        load_hypernetwork(directory, model, tokenizer)


@pytest.mark.parametrize("length", [0, 1, (1 << 63) - 1, (1 << 64) - 1])
def test_a_header_of_any_length_is_refused(checkpoint: Any, length: int) -> None:
    directory, model, tokenizer = checkpoint
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", length) + b"{}" * 10)
    with pytest.raises(InputError, match=r"model\.safetensors: damaged"):
        load_hypernetwork(directory, model, tokenizer)


@pytest.mark.parametrize("field", ["hidden_size", "expert_width", "core_size", "num_queries"])
def test_sizes_are_compared_before_memory_is_allocated(
    checkpoint: Any, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A configuration of terabytes: nothing but shapes may be made of it."""
    directory, model, tokenizer = checkpoint
    record = json.loads((directory / "config.json").read_text())
    record["hypernetwork"][field] = 10**6
    (directory / "config.json").write_text(json.dumps(record))
    made = []
    create = torch.empty
    with torch.device("meta"):  # at its first use, torch notes which functions create tensors
        create(1)

    def empty(*size: Any, **options: Any) -> torch.Tensor:
        tensor = create(*size, **options)
        made.append(0 if tensor.is_meta else tensor.nbytes)
        return tensor

    monkeypatch.setattr(torch, "empty", empty)
    with pytest.raises(InputError, match=r"its shapes differ from config\.json"):
        load_hypernetwork(directory, model, tokenizer)
    assert made and max(made) == 0


def test_stored_experts_are_those_that_their_file_describes(tmp_path: Path) -> None:
    ExpertFiles(tmp_path, "s").write(["one", "two"], (torch.ones(2, 3),))
    (path,) = (tmp_path / "s").iterdir()
    for units in ([2, 1], [1], [1, -1], [1, 1.0], "11", [[1], [1]], [1 << 70, 1]):
        header(path, lambda value, units=units: value["__metadata__"].update(units=json.dumps(units)))
        with pytest.raises(InputError, match="damaged experts"):
            ExpertFiles(tmp_path, "s")
    header(path, lambda value: value["__metadata__"].update(units="[1, 1]"))
    assert "two" in ExpertFiles(tmp_path, "s")


# Indexes


class Encoder:
    name, fingerprint, precision, pooling, dimension = "encoder", "fingerprint", "float32", "mean", 4
    options = EncoderOptions("", "")

    def encode_passages(self, passages: Any) -> np.ndarray:
        return np.eye(len(passages), 4, dtype=np.float32)


PASSAGES = [Passage(str(number), "Title", f"Text {number}") for number in range(4)]


@pytest.fixture
def index(tmp_path: Path) -> Path:
    index_passages(PASSAGES, Encoder(), tmp_path / "index", factory="Flat", progress=False)
    return tmp_path / "index"


def described(directory: Path, **changes: Any) -> None:
    """Change the manifest, and make the sizes in it true."""
    manifest = json.loads((directory / MANIFEST).read_text()) | changes
    for name, file in manifest["files"].items():
        file["bytes"] = (directory / name).stat().st_size
    (directory / MANIFEST).write_text(json.dumps(manifest))


def test_faiss_allocates_no_more_than_the_file_has_and_its_tables(index: Path) -> None:
    vectors = index / "index.faiss"
    content = bytearray(vectors.read_bytes())
    at = 4 + 4 + 3 * 8 + 1 + 4  # type, dimension, three numbers of vectors, whether it is trained, metric
    assert struct.unpack("<Q", content[at : at + 8]) == (4 * 4,)
    content[at : at + 8] = struct.pack("<Q", 1 << 36)
    vectors.write_bytes(content)
    described(index)
    with pytest.raises(InputError, match="damaged"):
        PassageIndex.load(index).search(np.ones((1, 4), np.float32), 1)


def test_faiss_allocates_no_lists_beyond_the_limit(tmp_path: Path) -> None:
    """Each list of an IVF index takes 48 bytes, however few of them the file has."""
    index_passages(PASSAGES, Encoder(), tmp_path / "index", factory="IVF1,Flat", progress=False)
    vectors = tmp_path / "index/index.faiss"
    head, kind, lists = vectors.read_bytes().partition(b"ilar")
    assert kind and struct.unpack("<Q", lists[:8]) == (1,)
    vectors.write_bytes(head + kind + struct.pack("<Q", 1 << 28) + lists[8:])
    described(tmp_path / "index")
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(InputError, match=r"index\.faiss: needs more memory than the 2,\d+,\d+,\d+ bytes"):
        PassageIndex.load(tmp_path / "index").search(np.ones((1, 4), np.float32), 1)
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_vectors_that_end_too_early_are_refused_without_a_crash(index: Path) -> None:
    """FAISS would crash on some lengths, which is why another process reads them here."""
    code = """
import json, sys
from pathlib import Path
import numpy as np
from genpoe_plugin.errors import InputError, harmless
from genpoe_plugin.retrieval.index import PassageIndex
index = Path(sys.argv[1])
whole, manifest = (index / "index.faiss").read_bytes(), json.loads((index / "index.json").read_text())
for length in range(len(whole)):
    (index / "index.faiss").write_bytes(whole[:length])
    manifest["files"]["index.faiss"]["bytes"] = length
    (index / "index.json").write_text(json.dumps(manifest))
    try:
        PassageIndex.load(index).search(np.ones((1, 4), np.float32), 1)
        sys.exit(f"{length} bytes of {len(whole)} are an index")
    except InputError:
        pass
"""
    done = subprocess.run([sys.executable, "-c", code, str(index)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_index_of_other_vectors_than_its_manifest_says_is_refused(index: Path) -> None:
    described(index, dimension=8)
    with pytest.raises(InputError, match="damaged index"):
        PassageIndex.load(index)


def test_offsets_of_passages_are_checked_before_they_are_followed(index: Path) -> None:
    """Arrow reads wherever an offset points to."""
    path = index / "passages.arrow"
    with pa.memory_map(str(path)) as file:
        texts = pa.ipc.open_file(file).get_batch(0).column("text")
        offsets = texts.buffers()[1].to_pybytes()[: 4 * (len(texts) + 1)]
    content = path.read_bytes()
    assert content.count(offsets) == 1
    wrong = struct.pack("<5i", 0, 1 << 30, 1 << 30, 1 << 30, 1 << 30)
    path.write_bytes(content.replace(offsets, wrong))
    described(index)
    with pytest.raises(InputError, match=r"passages\.arrow: damaged"):
        PassageIndex.load(index).passage(2)


def test_passages_without_text_are_refused(index: Path) -> None:
    """No corpus has one, and zeros in the file are read as such."""
    path = index / "passages.arrow"
    with pa.memory_map(str(path)) as file:
        texts = pa.ipc.open_file(file).get_batch(0).column("text")
        offsets = texts.buffers()[1].to_pybytes()[: 4 * (len(texts) + 1)]
    path.write_bytes(path.read_bytes().replace(offsets, bytes(len(offsets))))
    described(index)
    with pytest.raises(InputError, match=r"passages\.arrow: damaged .*without text"):
        PassageIndex.load(index).passage(2)


def test_a_manifest_with_a_name_that_is_too_long_for_a_file_is_refused(index: Path) -> None:
    manifest = json.loads((index / MANIFEST).read_text())
    manifest["files"]["a" * 5000] = {"bytes": 1, "sha256": ""}
    (index / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="not a valid index manifest"):
        PassageIndex.load(index)


def test_text_in_a_parquet_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    broken = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(struct.pack("<2i", 0, 2)), pa.py_buffer(b"a\xff")]
    )
    pq.write_table(pa.table({"question": broken}), tmp_path / "questions.parquet")
    with pytest.raises(InputError, match=r"questions\.parquet: not a complete Parquet file \(.*utf-8"):
        list(read_parquet_rows(tmp_path / "questions.parquet"))


# Links


def test_links_are_read_and_replaced_and_never_written_through(tmp_path: Path, index: Path) -> None:
    moved = tmp_path / "elsewhere"
    (index / "index.faiss").rename(moved)
    (index / "index.faiss").symlink_to(moved)
    assert PassageIndex.load(index).search(np.eye(1, 4, dtype=np.float32), 1)[1].tolist() == [[0]]
    before = moved.read_bytes()
    with atomic_file(index / "index.faiss") as temporary:
        temporary.write_text("new")
    assert moved.read_bytes() == before
    assert not (index / "index.faiss").is_symlink() and (index / "index.faiss").read_text() == "new"


# Results of lm_eval

MARKUP = "</script><script>steal()</script><img src=x onerror=steal()><svg/onload=steal()>\"'`{{7*7}}{%x%}&lt;b"


class Elements(HTMLParser):
    """The names of all elements of a page and of their attributes, and the texts of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.names: set[str] = set()
        self.scripts: list[str] = []
        self.inside = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.update([tag, *(f"{tag} {name}" for name, _ in attrs)])
        self.inside = tag == "script"
        if self.inside:
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.scripts[-1] += data


def results(folder: Path, text: str) -> None:
    """Three runs in which every name and text of others is or contains ``text``."""
    docs = documents(12, passages=2)
    for doc in docs:
        doc["question"] += text
        doc["answers"] = [text]
        for ctx in doc["ctxs"]:
            ctx.update(id=ctx["id"] + text, title=text, text=text)
    for number, passages in enumerate(("retrieved", "shuffled")):
        facts = genpoe_facts("genpoe", passages)
        facts["fingerprint"]["hypernetwork"] = facts["arguments"]["hypernetwork"] = text
        facts["provenance"] |= {"command": f"lm_eval --x '{text}", "directory": text, "versions": {text: text}}
        em = {"em": [float(n % 3 == number) for n in range(12)]}
        path = write_run(folder / passages, em, docs=docs, genpoe=facts, trace=True, model_args={"pretrained": text})
        samples = path.with_name(path.name.replace("results_", "samples_t_") + "l")
        samples.write_text(samples.read_text().replace('" response', f'"{json.dumps(text)[1:-1]}'))
    em = {"em": [float(n % 2) for n in range(12)]}
    write_run(folder / "hf", em, docs=docs, model_args={"pretrained": text, text: text}, version=text, shots=2)


def test_no_text_becomes_an_element_or_a_script(tmp_path: Path) -> None:
    results(tmp_path / "hostile", MARKUP)
    results(tmp_path / "plain", "words")
    hostile, plain = (Elements(page(compare([tmp_path / name], draws=20))) for name in ("hostile", "plain"))
    assert hostile.names == plain.names and "script" in plain.names
    assert len(hostile.scripts) == len(plain.scripts) >= 2
    # The last script is ours; those before are JSON, in which the text is text.
    assert hostile.scripts[-1] == plain.scripts[-1]
    questions = [entry["question"] for script in hostile.scripts[:-1] for entry in json.loads(script)["questions"]]
    assert questions and all(question.endswith(MARKUP) for question in questions)


def test_no_text_becomes_markup_in_markdown(tmp_path: Path) -> None:
    results(tmp_path / "hostile", f"{MARKUP}\n```\n<b>")
    tokens = MarkdownIt("commonmark").enable("table").parse(markdown(compare([tmp_path / "hostile"], draws=20)))
    tokens += [child for token in tokens for child in token.children or ()]
    markup = [token.content for token in tokens if token.type in ("html_block", "html_inline", "image", "link_open")]
    assert len(tokens) > 200 and markup == []


def test_no_text_acts_on_the_terminal(tmp_path: Path) -> None:
    """Neither control characters, such as those that clear the screen or reverse the text, nor rich's markup."""
    results(tmp_path / "hostile", "\x1b[2J\x1b]0;title\x07\u202e\r[red]x[/red]")
    stream = io.StringIO()
    show(compare([tmp_path / "hostile"], draws=20), Console(file=stream, width=400, color_system=None))
    printed = stream.getvalue()
    assert set(printed) & {"\x1b", "\x07", "\r", "\u202e"} == set()
    assert r"\x1b[2J\x1b]0;title\x07\u202e\r[red]x[/red]" in printed.replace("\n", "")


def test_records_stay_in_their_folder(tmp_path: Path) -> None:
    write_run(tmp_path / "run", {"em": [1.0] * 4}, docs=documents(4), task="..", model_args={"pretrained": "../.."})
    paths = write_records(compare([tmp_path / "run"], draws=20), tmp_path / "a/b/out")
    assert len(paths) == 1 and paths[0].is_file()
    assert (tmp_path / "a/b/out") in paths[0].resolve().parents
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


# Commands

WORDS = ["a b", "$(touch pwned)", "`touch pwned`", "x; touch pwned", "a'b\"c", "*", "~", "!1", "\\", "é\u3000", "x\ny"]


def in_a_shell(line: str, folder: Path) -> list[str]:
    """The words that a shell makes of a command, which is not run."""
    script = f"set -- {line}\nprintf '%s\\0' \"$@\""
    done = subprocess.run(["sh", "-c", script], cwd=folder, capture_output=True, check=True)
    return done.stdout.decode().split("\0")[:-1]


@pytest.mark.parametrize("word", WORDS)
def test_a_printed_command_is_words_in_a_shell(tmp_path: Path, word: str) -> None:
    recorded = genpoe_facts()
    recorded["provenance"] |= {"command": shlex.join(["lm_eval", "--x", word]), "directory": str(tmp_path)}
    for name, facts in (("recorded", recorded), ("reconstructed", None)):
        folder = tmp_path / name
        write_run(folder, {"em": [1.0] * 4}, docs=documents(4), genpoe=facts, model_args={"pretrained": word})
        result = CliRunner().invoke(main, ["compare", str(folder), "--reproduce", "1"])
        assert result.exit_code == 0, result.output
        line = result.stdout.split("\n", 1)[1].rstrip("\n")  # after the folder, or after the note
        words = in_a_shell(line, tmp_path)
        assert words == shlex.split(line) and words[0] == "lm_eval"
        assert word in words or f"pretrained={word}" in words
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    "command",
    [
        "lm_eval x; touch pwned",
        "lm_eval $(touch pwned)",
        "lm_eval | sh",
        "touch pwned",
        "lm_eval 'x",
        ["touch"],
        "\x1b[2J",
    ],
)
def test_a_recorded_command_that_does_something_else_is_not_printed(tmp_path: Path, command: Any) -> None:
    facts = genpoe_facts()
    facts["provenance"] |= {"command": command, "directory": "/tmp\n;touch pwned"}
    write_run(tmp_path / "run", {"em": [1.0] * 4}, docs=documents(4), genpoe=facts)
    result = CliRunner().invoke(main, ["compare", str(tmp_path / "run"), "--reproduce", "1"])
    if isinstance(command, list):
        assert result.exit_code == 2 and "provenance.command" in result.stderr
        return
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.stdout
    commands = "\n".join(line for line in result.stdout.split("\n") if line.startswith("lm_eval"))
    assert in_a_shell(commands, tmp_path)[0] == "lm_eval"
    assert not (tmp_path / "pwned").exists()


def test_cells_are_run_without_a_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[list[str], dict[str, Any]]] = []

    def run(command: list[str], **options: Any) -> Any:
        started.append((command, options))
        return SimpleNamespace(wait=lambda: 1)

    declared = {
        "out": str(tmp_path / "runs"),
        "tasks": ["t;id"],
        "options": {"system_instruction": "$(touch pwned)", "metadata": {"a": "`id`"}},
        "models": {f"m{number}": {"model": "hf", "pretrained": word} for number, word in enumerate(WORDS)},
    }
    (tmp_path / "matrix.yaml").write_text(json.dumps(declared))
    monkeypatch.setattr(matrices.subprocess, "Popen", run)
    with pytest.raises(InputError, match="lm_eval stopped with status 1"):
        run_matrix(read_matrix(tmp_path / "matrix.yaml"))
    assert len(started) == len(WORDS)
    for (command, options), word in zip(started, WORDS, strict=True):
        assert command[:3] == [sys.executable, "-m", "lm_eval"] and not options.get("shell")
        assert f"pretrained={word}" in command and "$(touch pwned)" in command and "t;id" in command
    assert not os.path.exists("pwned")
