"""The readers of files from others, each with valid files to damage and a function that reads them as users do."""

from __future__ import annotations

import csv
import gzip
import json
import random
from collections.abc import Callable, Iterable, Sequence
from contextlib import chdir, suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.fuzz.mutation import mutate
from benchmarks.random_llm import random_llm
from benchmarks.synthetic_results import documents, genpoe_facts, write_run
from genpoe_plugin.checkpoints.checkpoint import HypernetworkCheckpoint, save_hypernetwork
from genpoe_plugin.comparison import every_eval_ever, output_files
from genpoe_plugin.comparison.latex import latex
from genpoe_plugin.comparison.leaderboard import compare
from genpoe_plugin.comparison.lm_eval_table import lm_eval_tables
from genpoe_plugin.comparison.markdown import markdown
from genpoe_plugin.comparison.matrix import is_finished, read_matrix
from genpoe_plugin.data.passages import Passage, read_passages
from genpoe_plugin.data.questions import Question, RetrievedPassage, read_header, read_questions, write_questions
from genpoe_plugin.data.trec import read_qrels, read_run
from genpoe_plugin.experts.config import PRESETS, HypernetworkConfig
from genpoe_plugin.experts.expert_files import ExpertFiles
from genpoe_plugin.experts.hypernetwork import Hypernetwork
from genpoe_plugin.indexing.bm25_building import build_bm25
from genpoe_plugin.indexing.encoding import index_passages
from genpoe_plugin.indexing.passage_writing import write_passages
from genpoe_plugin.indexing.shards import Shards
from genpoe_plugin.indexing.vectors import chunks
from genpoe_plugin.retrieval.bm25 import BM25Retriever
from genpoe_plugin.retrieval.encoder_options import EncoderOptions
from genpoe_plugin.retrieval.index import PassageIndex
from genpoe_plugin.selection.reranker_format import read_format
from genpoe_plugin.selection.result_files import make_results
from genpoe_plugin.training.reranker_data import read_examples
from genpoe_plugin.training.trainer_state import Progress, full_state, load_state, read_progress, save_state

matplotlib.get_configdir(), matplotlib.get_cachedir()  # made once, outside the folders that readers may write to
PASSAGES = [
    Passage(str(number), f"Title {number}", f"The text of passage {number}, żółć 東京.") for number in range(40)
]
DIMENSION = 8


@dataclass(frozen=True)
class Reader:
    """A reader.

    Attributes:
        make: writes valid files into a folder.
        read: reads them and uses what was read; it gets the folder and the path of the damaged file.
        repair: makes sizes in the files' descriptions true again after a change, so that more than a comparison of
            sizes is tested; it may raise anything.
    """

    make: Callable[[Path], None]
    read: Callable[[Path, Path], None]
    repair: Callable[[Path], None] | None = None


def _consume(items: Iterable[Any]) -> None:
    for _ in items:
        pass


def _write_lines(path: Path, records: Iterable[Any]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


# Passages and questions


def _ctxs(number: int) -> list[dict[str, Any]]:
    fields = {"score": "1.5", "rank": 1, "rerank_score": 0.5, "rerank_rank": 1, "has_answer": True}
    return [{"id": p.id, "title": p.title, "text": p.text, **fields} for p in PASSAGES[number : number + 2]]


def _make_passages(folder: Path) -> None:
    rows = "".join(f'{p.id}\t"{p.text}"\t{p.title}\n' for p in PASSAGES[:5])
    (folder / "passages.tsv").write_text(f"id\ttext\ttitle\n{rows}")
    (folder / "passages.tsv.gz").write_bytes(gzip.compress(rows.encode()))
    _write_lines(folder / "beir.jsonl", ({"_id": p.id, "title": p.title, "text": p.text} for p in PASSAGES[:5]))
    _write_lines(folder / "pyserini.jsonl", ({"id": p.id, "contents": p.text} for p in PASSAGES[:5]))
    results = [{"question": "Who?", "answers": ["a"], "ctxs": _ctxs(number)} for number in range(3)]
    (folder / "dpr.json").write_text(json.dumps(results))


def _read_passages(folder: Path, path: Path) -> None:
    for passage in read_passages(path):
        assert passage.id and passage.text.strip() and passage.string.encode()


def _make_questions(folder: Path) -> None:
    question = {"question": "Who wrote it?", "answers": ["Rossini", "Gioachino Rossini"]}
    (folder / "dpr.json").write_text(json.dumps([{**question, "ctxs": _ctxs(number)} for number in range(3)]))
    (folder / "qas.csv").write_text("who wrote it\t['Rossini', \"Gioachino's\"]\nwhere\t['Pesaro']\n")
    _write_lines(folder / "nq.jsonl", [{"question": "who", "answer": ["Rossini"]}] * 2)
    training = {**question, "positive_ctxs": _ctxs(0), "hard_negative_ctxs": _ctxs(2), "negative_ctxs": []}
    (folder / "training.json").write_text(json.dumps([training]))
    gold = {"question": "who", "short_answers": ["Rossini"], "example_id": 7, "title": "T", "context": "C"}
    (folder / "gold.json").write_text(json.dumps({"data": [gold, {**gold, "context": ""}]}))
    paragraph = {"context": "Text.", "qas": [{"question": "who", "answers": [{"text": "a"}]}]}
    squad = {"version": "v2.0", "data": [{"title": "A_b", "paragraphs": [paragraph]}]}
    (folder / "squad.json").write_text(json.dumps(squad))
    hotpot = {"question": "who", "answer": "a", "context": [["T", ["One.", "Two."]]], "supporting_facts": [["T", 0]]}
    (folder / "hotpot.json").write_text(json.dumps([hotpot]))
    rewrite = {"prompt": "{} was born in", "subject": "He", "target_new": {"str": "Rome"}}
    mquake = {"case_id": 1, "questions": ["where"], "requested_rewrite": [rewrite], "new_answer": "Rome"}
    (folder / "mquake.json").write_text(json.dumps([{**mquake, "new_answer_alias": ["Roma"]}]))
    hub = {"context": {"title": ["T"], "sentences": [["One."]]}, "supporting_facts": {"title": ["T"], "sent_id": [0]}}
    summary = {"document": {"summary": {"text": "Once.", "title": "T"}}, "question": {"text": "who"}}
    swap = {"question": "who", "sub_answer": ["b"], "sub_context": "It was b.", "org_answer": ["a"]}
    trivia = {"question": "who", "answer": {"value": "a", "aliases": ["b"]}}
    rows = [
        *({**hub, "question": "who", "answer": "a"}, {**summary, "answers": [{"text": "a"}]}, swap, trivia),
        *(
            {"context": "Text.", "question": "who", "title": "T", "answers": {"text": ["a"]}},
            {"_id": "q", "text": "who"},
        ),
    ]
    _write_lines(folder / "rows.jsonl", rows)
    (folder / "popqa.tsv").write_text('id\tquestion\tpossible_answers\n1\twho\t"[""a"", ""b""]"\n')
    table = pyarrow.table({"question": ["who"] * 3, "answer": [["a", "b"]] * 3})
    pyarrow.parquet.write_table(table, folder / "nq.parquet")


def _make_narrativeqa(folder: Path) -> None:
    (folder / "third_party/wikipedia").mkdir(parents=True)
    for name, rows in (
        ("documents.csv", [["document_id", "wiki_title"], ["d", "Title"]]),
        ("third_party/wikipedia/summaries.csv", [["document_id", "summary"], ["d", "Once\nupon, a time."]]),
        ("qaps.csv", [["document_id", "set", "question", "answer1", "answer2"], ["d", "test", "Who?", "a", "b"]]),
    ):
        with (folder / name).open("w", newline="") as file:
            csv.writer(file).writerows(rows)


def _check_questions(path: Path, need_answers: bool) -> None:
    """Read questions, and see that what was read can be written, and read again."""
    questions = list(read_questions(path, need_answers=need_answers))
    written = (path if path.is_dir() else path.parent) / "written.jsonl"
    write_questions(written, questions)
    again = list(read_questions(written, need_answers=False))
    assert again == questions, "questions differ after they are written and read again"


def _read_questions(folder: Path, path: Path) -> None:
    _check_questions(path, need_answers=path.name != "rows.jsonl")


def _read_narrativeqa(folder: Path, path: Path) -> None:
    _check_questions(folder, need_answers=True)


QUESTIONS = [
    Question(f"Question {number}?", ("a",), tuple(RetrievedPassage(p, 1.5, r) for r, p in enumerate(PASSAGES[:3], 1)))
    for number in range(4)
]


def _make_results(folder: Path) -> None:
    write_questions(folder / "done.jsonl", QUESTIONS, index="i", k=3)
    write_questions(folder / "done.jsonl.gz", QUESTIONS)
    write_questions(folder / "results.jsonl.part", QUESTIONS[:2], index="i")


def _read_results(folder: Path, path: Path) -> None:
    json.dumps(read_header(path))
    _check_questions(path, need_answers=False)
    # As `genpoe rerank` resumes from the part.
    make_results(folder / "results.jsonl", QUESTIONS, lambda rest: (replace(q) for q in rest), {"index": "i"})


def _make_trec(folder: Path) -> None:
    (folder / "run").write_text("".join(f"q{n % 3} Q0 p{n} {n} {9 - n / 2} tag\n" for n in range(9)))
    (folder / "qrels").write_text("".join(f"q{n % 3} 0 p{n} {n % 2}\n" for n in range(9)))
    (folder / "beir.qrels").write_text("query-id\tcorpus-id\tscore\nq1\tp1\t1\n")


def _read_trec(folder: Path, path: Path) -> None:
    for scores in read_run(folder / "run").values():
        assert np.isfinite(list(scores.values())).all()
    for name in ("qrels", "beir.qrels"):
        read_qrels(folder / name)


def _make_reranker(folder: Path) -> None:
    _write_lines(folder / "data.jsonl", [{"query": "who", "pos": ["a"], "neg": ["b", "c"], "prompt": "P"}] * 2)
    template = {"pieces": ["Q: {query}\n", "P: {passage}"], "yes": "Yes", "no": "No", "max_length": 64, "bos": True}
    (folder / "format.json").write_text(json.dumps(template))


def _read_reranker(folder: Path, path: Path) -> None:
    read_examples(folder / "data.jsonl")
    form = read_format(str(folder / "format.json"))
    form.fill(form.pieces[form.passage_piece], "who", "text", form.prompt)


# Checkpoints, training and experts


@cache
def _llm() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    return random_llm(16, 2, head_width=8)


def _config(preset: str) -> HypernetworkConfig:
    heads = {"num_heads": 2, "num_kv_heads": 2, "head_width": 8} if PRESETS[preset]["head"] == "attention" else {}
    sizes = {"paper": {"rank": 4, "code_size": 4}, "memory": {"num_queries": 4, "core_size": 4}}.get(preset, {})
    return HypernetworkConfig.preset(preset, hidden_size=16, layers=[1], **heads, **sizes)


def _make_checkpoints(folder: Path) -> None:
    model, tokenizer = _llm()
    for preset in PRESETS:
        training = {"step": 3, "arguments": {"learning_rate": 1e-4}}
        save_hypernetwork(folder / preset, Hypernetwork(_config(preset)), model, tokenizer, training)


def _read_checkpoints(folder: Path, path: Path) -> None:
    checkpoint = HypernetworkCheckpoint.from_pretrained(path.parent)
    assert checkpoint.base_model is not None and checkpoint.config.to_dict()
    checkpoint.load(*_llm()).none()


def _module() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    return module, torch.optim.AdamW(module.parameters())


def _make_training(folder: Path) -> None:
    module, optimizer = _module()
    module(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    progress = Progress({"rate": 0.1}, 1, [(1, 0.5, 0.1)], [{"step": 1, "nats": 0.5}], 1)
    save_state(folder, *full_state(module, optimizer), progress)


def _read_training(folder: Path, path: Path) -> None:
    saved = folder / "step-00000001"
    read_progress(saved)
    load_state(saved, *_module())


def _make_experts(folder: Path) -> None:
    files = ExpertFiles(folder, "settings")
    weights = (torch.randn(6, 3, 2), torch.randn(6, 4))
    files.write(["one", "two", "three"], tuple(weight[:3] for weight in weights))
    files.write(["four", "five"], tuple(weight[3:] for weight in weights), [1, 2])


def _read_experts(folder: Path, path: Path) -> None:
    files = ExpertFiles(folder, "settings")
    if known := [name for name in ("one", "two", "three", "four", "five") if name in files]:
        first, second = files.read(known)
        assert len(first) == len(second) >= len(known)


# Indexes


class _Encoder:
    """An encoder whose vectors depend on the length of a text."""

    name, fingerprint, precision, pooling, dimension = "encoder", "fingerprint", "float32", "mean", DIMENSION
    options = EncoderOptions("", "")

    def encode_passages(self, passages: Sequence[Passage]) -> np.ndarray:
        rng = np.random.default_rng(len(passages))
        return rng.standard_normal((len(passages), DIMENSION)).astype(np.float32)

    encode_questions = encode_passages


def _make_index(factory: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        index_passages(PASSAGES, _Encoder(), folder / "index", factory=factory, progress=False)

    return make


def _read_index(folder: Path, path: Path) -> None:
    index = PassageIndex.load(folder / "index")
    assert index.fingerprint and index.encoder_words
    _, rows = index.search(np.ones((2, DIMENSION), np.float32), 3)
    for row in rows[rows >= 0].tolist():
        assert index.passage(row).string.encode()
    index.passages.find(["3"])


def _repair_index(folder: Path) -> None:
    path = folder / "index/index.json"
    manifest = json.loads(path.read_text())
    for name, file in manifest["files"].items():
        file["bytes"] = (path.parent / name).stat().st_size
    path.write_text(json.dumps(manifest))


def _make_bm25(folder: Path) -> None:
    build_bm25(PASSAGES, folder / "index", progress=False)


def _read_bm25(folder: Path, path: Path) -> None:
    retriever = BM25Retriever.load(folder / "index")
    assert retriever.fingerprint and retriever.corpus
    for found in retriever.retrieve(["The text of passage 3", "Title"], 3):
        assert all(entry.passage.string.encode() for entry in found)


def _make_shards(folder: Path) -> None:
    shards = Shards.create(folder / "shards", _Encoder(), count=40, digest="d", shard_size=32)
    for number in shards.numbers:
        rows = PASSAGES[32 * number : 32 * (number + 1)]
        shards.write(number, rows, _Encoder().encode_passages(rows))


def _read_shards(folder: Path, path: Path) -> None:
    shards = Shards.open(folder / "shards")
    shards.missing()
    write_passages(shards, folder)
    _consume(chunks(shards, 0, shards.count, 16))


def _repair_shards(folder: Path) -> None:
    for path in (folder / "shards").glob("shard-*.json"):
        record = json.loads(path.read_text())
        for name, file in record["files"].items():
            file["bytes"] = (path.parent / name).stat().st_size
        path.write_text(json.dumps(record))


# Comparisons


def _make_matrix(folder: Path) -> None:
    declared = {
        "out": "runs",
        "tasks": ["t"],
        "options": {"limit": 4, "gen_kwargs": {"max_gen_toks": 8}, "metadata": {"genpoe_nq_path": "file"}},
        "model_args": {"pretrained": "llm"},
        "modes": ["closed_book", "rag"],
        "models": {"plain": {"model": "hf"}, "ours": {"passages": ["retrieved", "shuffled"], "seeds": [0, 1]}},
    }
    (folder / "matrix.yaml").write_text(json.dumps(declared))
    matrix = read_matrix(folder / "matrix.yaml")
    run = folder / matrix.folder(matrix.cells[0])
    run.mkdir(parents=True)
    (run / "cell.json").write_text(
        json.dumps({"command": matrix.command(matrix.cells[0]), "contents": {"pretrained": "llm"}})
    )


def _read_matrix(folder: Path, path: Path) -> None:
    with chdir(folder):
        matrix = read_matrix(Path("matrix.yaml"))
        for cell in matrix.cells:
            assert all(isinstance(word, str) for word in matrix.command(cell))
            assert matrix.folder(cell).parent == matrix.out
            is_finished(matrix, cell)


DOCS = documents(12, passages=2)


def _make_lm_eval(folder: Path) -> None:
    rng = random.Random(0)
    for number in range(2):
        scores = {"em": [float(rng.random() < 0.5) for _ in DOCS], "f1": [rng.random() for _ in DOCS]}
        # Without the digest of the samples, which no change would pass.
        write_run(folder / str(number), scores, docs=DOCS, shots=number, task_hashes={}, second=number)


def _make_traces(folder: Path) -> None:
    for mode, passages in (("genpoe", "retrieved"), ("genpoe", "shuffled"), ("rag", "retrieved")):
        scores = {"em": [float(number % 3 == len(passages) % 3) for number in range(len(DOCS))]}
        facts = genpoe_facts(mode, passages)
        path = write_run(folder / f"{mode}-{passages}", scores, docs=DOCS, genpoe=facts, trace=True, task_hashes={})
        # The folder is copied, so the trace has to be found beside the results.
        path.write_text(path.read_text().replace(f"{path.parents[1]}/", ""))


def _read_results_of_lm_eval(folder: Path, path: Path) -> None:
    comparison = compare([folder], draws=20)
    assert json.dumps(output_files.record(comparison), ensure_ascii=False).encode() and markdown(comparison).encode()
    if path.stat().st_size % 8 == 0:  # the page takes seconds
        output_files.write(comparison, folder / "out")
    every_eval_ever.write_records(comparison, folder / "records")
    assert latex(comparison).encode() and lm_eval_tables(comparison).encode()


READERS = {
    "passages": Reader(_make_passages, _read_passages),
    "questions": Reader(_make_questions, _read_questions),
    "narrativeqa": Reader(_make_narrativeqa, _read_narrativeqa),
    "results": Reader(_make_results, _read_results),
    "trec": Reader(_make_trec, _read_trec),
    "reranker": Reader(_make_reranker, _read_reranker),
    "checkpoint": Reader(_make_checkpoints, _read_checkpoints),
    "training": Reader(_make_training, _read_training),
    "experts": Reader(_make_experts, _read_experts),
    "index-flat": Reader(_make_index("Flat"), _read_index, _repair_index),
    "index-ivf": Reader(_make_index("IVF2,SQ8"), _read_index, _repair_index),
    "bm25": Reader(_make_bm25, _read_bm25, _repair_index),
    "shards": Reader(_make_shards, _read_shards, _repair_shards),
    "matrix": Reader(_make_matrix, _read_matrix),
    "lm-eval": Reader(_make_lm_eval, _read_results_of_lm_eval),
    "trace": Reader(_make_traces, _read_results_of_lm_eval),
}
"""The readers by name."""


def damaged(reader: Reader, folder: Path, rng: random.Random) -> Path:
    """Damage one of the files of a reader in ``folder``; returns its path."""
    files = _files(folder)
    path = rng.choice(files)
    mutate(path, rng, files)
    if reader.repair is not None and rng.random() < 0.8:
        with suppress(Exception):  # it may be the description that is damaged
            reader.repair(folder)
    return path
