"""Bad inputs at the command line: each gets one line that names what is wrong, and nothing is written."""

from __future__ import annotations

import gzip
import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from benchmarks.synthetic_results import documents, write_run
from genpoe_plugin.data.passages import Passage
from genpoe_plugin.indexing.bm25_building import build_bm25
from train_cli.main import main

Content = str | bytes
Case = tuple[str, dict[str, Content], str]
"""A command, the files that it reads, and a part of the line that is expected. ``bad`` is the name of the bad file."""

CTX = {"id": "1", "title": "T", "text": "The text."}
DEEP = 3000


def dpr(**changes: Any) -> str:
    return json.dumps({"question": "who", "answers": ["a"], "ctxs": [CTX]} | changes)


def ctx(**changes: Any) -> str:
    return dpr(ctxs=[CTX | changes])


def without(field: str) -> str:
    return dpr(ctxs=[{name: value for name, value in CTX.items() if name != field}])


LONG = "x" * (1 << 24)
TEXTS: list[tuple[str, Content, str]] = [
    ("empty", "", "the file is empty"),
    ("blank", " \n\n\t\n", "the file is empty"),
    ("latin-1", '{"question": "caf\xe9"}'.encode("latin-1"), "not UTF-8 text"),
    ("utf-16", "{}".encode("utf-16"), "not UTF-8 text"),
    ("not JSON", '{"question": ', "bad:1: not JSON"),
    ("half an object", dpr()[:-9], "bad:1: not JSON"),
    ("second line", f"{dpr()}\n{{\n", "bad:2: not JSON"),
    ("a number", f"{dpr()}\n7\n", "bad:2: expected one JSON object per line"),
    ("text in a list", '["who"]', "item 1: expected a JSON object"),
    ("half a list", f"[{dpr()},", "not JSON"),
    ("two lists", f"[{dpr()}] []", "not JSON (Extra data"),
    ("no comma", f"[{dpr()} {dpr()}]", "Expecting ',' delimiter"),
    ("a thousand levels", '{"a":' * DEEP + "1" + "}" * DEEP, "bad:1: not JSON (nested too deeply)"),
    ("a thousand lists", "[" * DEEP, "not JSON (nested too deeply"),
    ("levels in a list", f"[{'[' * DEEP}", "not JSON (nested too deeply"),
    ("digits", f'{{"question": {"9" * 5000}}}', "bad:1: not JSON"),
    ("digits in a list", f'[{{"question": {"9" * 5000}}}]', "bad:1: not JSON"),
    ("a line without an end", '{"question": "' + LONG, "bad:1: longer than 16,777,216 characters"),
    ("another version", '{"format": "genpoe-retrieval", "version": 9}', "only version 1 is supported"),
    ("an object as version", '{"format": "genpoe-retrieval", "version": {}}', "only version 1 is supported"),
]
QUESTIONS: list[tuple[str, Content, str]] = [
    ("no question", dpr(question=""), "a question must be a non-empty string"),
    ("a null question", dpr(question=None), "a question must be a non-empty string"),
    ("a question of numbers", dpr(question=[1]), "a question must be a non-empty string"),
    ("no answers", dpr(answers=[]), "a question needs a list of answer strings"),
    ("numbers as answers", dpr(answers=[1]), "a question needs a list of answer strings"),
    ("an answer object", dpr(answers={"a": 1}), "a question needs a list of answer strings"),
    ("NUL", dpr(question="a\0b"), "NUL character"),
    ("a lone surrogate", dpr(question="\ud800"), "is a lone surrogate"),
    ("an answer's surrogate", dpr(answers=["\udfff"]), "is a lone surrogate"),
    ("a case's surrogate", dpr(case="\ud800"), "is a lone surrogate"),
    ("an id's surrogate", dpr(id="\ud800"), "is a lone surrogate"),
    ("ctxs as text", dpr(ctxs="text"), "expected a list of JSON objects"),
    ("ctxs as object", dpr(ctxs={"id": 1}), "expected a list of JSON objects"),
    ("a ctx as text", dpr(ctxs=["text"]), "item 1: expected a JSON object"),
    ("an empty passage", ctx(text=" "), "has no text"),
    ("a passage without text", without("text"), "the \"text\" of passage '1'"),
    ("a title of numbers", ctx(title=[1]), 'and its "title", if any'),
    ("an id of truth", ctx(id=True), 'the "id" of a passage must be'),
    ("an empty id", ctx(id=""), 'the "id" of a passage must be'),
    ("a score of words", ctx(score="high"), '"score" must be a number'),
    ("an infinite score", ctx(score=float("inf")), '"score" must be a number'),
    ("a score that is no number", ctx(score=float("nan")), '"score" must be a number'),
    ("a huge score", ctx(score=10**400), '"score" must be a number'),
    ("rank 0", ctx(rank=0), '"rank" must be a whole number from 1 on'),
    ("half a rank", ctx(rank=1.5), '"rank" must be a whole number from 1 on'),
    ("a rank of lists", ctx(rerank_rank=[[]]), '"rerank_rank" must be a number'),
    ("a passage's NUL", ctx(text="a\0"), "NUL character"),
    ("a passage's surrogate", ctx(title="\ud83d"), "is a lone surrogate"),
    ("code as answers", "who\t__import__('os').system('id')\n", "answers must be a list of strings"),
    ("deep answers", f"who\t{'[' * DEEP}\n", "answers must be a list of strings"),
    ("a number as answer", "who\t7\n", "a question needs a list of answer strings"),
    ("three fields", "who\t['a']\tb\n", "3 fields"),
    ("an open quote", "who\t\"['a']\n", "broken quoting"),
    ("PopQA with a field less", "question\tpossible_answers\nwho\n", "1 fields"),
    ("PopQA's deep answers", f"question\tpossible_answers\nwho\t{'[' * DEEP}\n", "not a valid record of PopQA"),
    ("SQuAD without answers", '{"paragraphs": [{"qas": [{}]}]}', "not a valid record of SQuAD's file"),
    ("SQuAD's paragraphs", '{"paragraphs": 7}', "not a valid record of SQuAD's file"),
    (
        "HotpotQA's context",
        '{"question": "who", "context": 7, "supporting_facts": []}',
        "not a valid record of HotpotQA",
    ),
    ("MQuAKE's edits", '{"requested_rewrite": [7]}', "not a valid record of MQuAKE"),
    ("NarrativeQA's summary", '{"question": {}, "document": {}}', "not a valid record of NarrativeQA"),
    ("TriviaQA's answer", '{"question": "who", "answer": {}}', "not a valid record of TriviaQA"),
    ("NQ-Swap's answers", '{"question": "who", "sub_context": "c"}', "not a valid record of NQ-Swap"),
    ("half of a Parquet file", b"PAR1" + bytes(60), "not a complete Parquet file"),
    ("a pickle", pickle.dumps([1]), "a pickle, which is not read"),
]
PASSAGES: list[tuple[str, Content, str]] = [
    ("two fields", "1\ttext\n", "2 fields"),
    ("four fields", "1\ttext\ttitle\tmore\n", "4 fields"),
    ("no id in TSV", "\ttext\ttitle\n", 'the "id" of a passage must be'),
    ("no text in TSV", "1\t\ttitle\n", "passage '1' has no text"),
    ("quotes in TSV", '1\t"text"x\ttitle\n', "broken quoting"),
    ("NUL in TSV", "1\tte\0xt\ttitle\n", "NUL character"),
    ("no id", '{"text": "t"}', 'the "id" of a passage must be'),
    ("half an id", '{"id": 1.5, "text": "t"}', 'the "id" of a passage must be'),
    ("a list as id", '{"id": [], "text": "t"}', 'the "id" of a passage must be'),
    ("no text", '{"id": 1}', 'the "text" of passage 1'),
    ("a list as text", '{"id": 1, "text": ["t"]}', 'the "text" of passage 1'),
    ("an id twice", '{"id": 1, "text": "t"}\n{"id": "1", "text": "u"}\n', "bad:2: id '1' is also the id of"),
    ("an id with two texts", f"{ctx()}\n{ctx(text='other')}\n", "is already the id of another passage"),
    ("ctxs as number", '{"ctxs": 7}', "expected a list of JSON objects"),
    ("stop words only", '{"id": 1, "text": "the of and"}', "no words but stop words"),
    ("no passages", "[]", "no passages in it"),
    ("a pickle as passages", pickle.dumps([1]), "unpickling can run any code"),
]
PLAIN = "{q} Q0 {p} 1 2.5 tag\n"
RUNS: list[tuple[str, Content, str]] = [
    ("empty run", "", "the file is empty; give a run"),
    ("five fields", "1 Q0 p1 1 2.5\n", "5 fields; a line of a run"),
    ("seven fields", "1 Q0 p1 1 2.5 a b\n", "7 fields; a line of a run"),
    ("a word as score", "1 Q0 p1 1 high tag\n", "'high' is not a number"),
    ("NaN as score", "1 Q0 p1 1 nan tag\n", "'nan' is not a number"),
    ("infinity as score", "1 Q0 p1 1 -inf tag\n", "'-inf' is not a number"),
    ("overflow as score", "1 Q0 p1 1 1e999 tag\n", "'1e999' is not a number"),
    ("a passage twice", "1 Q0 p1 1 2 t\n1 Q0 p1 2 1 t\n", "passage 'p1' is named twice"),
    ("an unknown passage", "1 Q0 zz 1 2 t\n", "not among the passages, such as 'zz'"),
    ("an unknown question", "9 Q0 p1 1 2 t\n", "not in the file of questions, such as '9'"),
    ("binary run", b"\xff\xfe\0", "not UTF-8 text"),
    ("a run in one line", "1 " * (1 << 23), "longer than 16,777,216 characters"),
    ("no gzip as run.gz", "1 Q0 p1 1 2 t\n", "damaged or incomplete gzip file"),
]
QRELS: list[tuple[str, Content, str]] = [
    ("empty qrels", "", "no judgements"),
    ("two fields of qrels", "1 p1\n", "2 fields; a line of qrels"),
    ("half a grade", "1 0 p1 0.5\n", "the grade must be a whole number"),
    ("a word as grade", "1 0 p1 yes\n", "'yes' is not a number"),
    ("NaN as grade", "1 0 p1 nan\n", "'nan' is not a number"),
    ("a header without lines", "query-id corpus-id score\n", "no judgements"),
]
MANIFEST = {
    "format": "genpoe-index",
    "version": 3,
    "encoder": "e",
    "fingerprint": "f",
    "pooling": "mean",
    "dimension": 4,
    "factory": "Flat",
    "count": 2,
    "vectors": ["index.faiss"],
    "search": {"parameters": {}},
    "files": {"index.faiss": {"bytes": 0, "sha256": ""}, "passages.arrow": {"bytes": 0, "sha256": ""}},
}


def manifest(**changes: Any) -> str:
    return json.dumps(MANIFEST | changes)


INVALID = "not a valid index manifest"
MANIFESTS: list[tuple[str, Content, str]] = [
    ("an empty manifest", "", INVALID),
    ("half a manifest", manifest()[:-9], INVALID),
    ("a list as manifest", "[]", INVALID),
    ("a number as manifest", "7", INVALID),
    ("a deep manifest", "[" * DEEP, INVALID),
    ("a manifest of digits", "9" * 5000, INVALID),
    ("a manifest in latin-1", b"\xe9", INVALID),
    ("a manifest's surrogate", manifest(encoder="\ud800"), INVALID),
    ("another format", manifest(format="other"), "another format instead of version 3"),
    ("another version of an index", manifest(version=9), "version 9 instead of version 3"),
    ("a list as version", manifest(version=[3]), "version [3] instead of version 3"),
    ("files as list", manifest(files=[]), INVALID),
    ("a file without size", manifest(files={"index.faiss": {}}), INVALID),
    ("a size of words", manifest(files={"index.faiss": {"bytes": "many", "sha256": ""}}), INVALID),
    ("an infinite size", manifest(files={"index.faiss": {"bytes": float("inf"), "sha256": ""}}), INVALID),
    ("a number as hash", manifest(files={"index.faiss": {"bytes": 0, "sha256": 7}}), INVALID),
    ("another size", manifest(files={"index.faiss": {"bytes": 9, "sha256": ""}}), "0 bytes where 9 bytes were written"),
    ("a missing file", manifest(files={"none": {"bytes": 9, "sha256": ""}}), "no file where 9 bytes were written"),
    (
        "a file above",
        manifest(files={"../bad": {"bytes": 9, "sha256": ""}}),
        "'../bad', which is not a file of its dir",
    ),
    ("an absolute file", manifest(files={"/etc/passwd": {"bytes": 9, "sha256": ""}}), "which is not a file of its dir"),
    ("the folder as file", manifest(files={".": {"bytes": 9, "sha256": ""}}), "which is not a file of its dir"),
    ("no encoder", manifest(encoder=None), INVALID),
    ("an encoder's options", manifest(encoder_options={"question_prompt": 7}), INVALID),
    ("unknown options", manifest(encoder_options={"x": 7}), INVALID),
    ("vectors above", manifest(vectors=["../index.faiss"]), INVALID),
    ("vectors in a list", manifest(vectors=[["index.faiss"]]), INVALID),
    ("no vectors", manifest(vectors=[]), INVALID),
    ("no passages of an index", manifest(files={"index.faiss": {"bytes": 0, "sha256": ""}}), INVALID),
    ("a count of 0", manifest(count=0), INVALID),
    ("dimension -1", manifest(dimension=-1), INVALID),
    ("no parameters", manifest(search={}), INVALID),
    ("a parameter of words", manifest(search={"parameters": {"nprobe": "all"}}), INVALID),
    ("a huge parameter", manifest(search={"parameters": {"k_factor_rf": 1e12}}), INVALID),
    ("an empty file of passages", manifest(), "passages.arrow: damaged"),
    ("an unknown retriever", manifest(retriever="magic"), "an index of magic"),
    ("BM25 without fields", manifest(retriever="bm25"), INVALID),
]


def matrix(**changes: Any) -> str:
    return json.dumps({"tasks": ["t"], "models": {"m": {"model": "hf", "pretrained": "llm"}}, "out": "runs"} | changes)


LAUGHS = f"[{', '.join(['&a0 [1, 1]', *(f'&a{n} [*a{n - 1}, *a{n - 1}]' for n in range(1, 40))])}]"
MATRICES: list[tuple[str, Content, str]] = [
    ("an empty matrix", "", "not a mapping"),
    ("a list as matrix", "[1]", "not a mapping"),
    ("an open bracket", "models: [", "not YAML"),
    ("a tab", "models:\n\t- x", "not YAML"),
    ("latin-1 in YAML", b"models: caf\xe9", "not YAML"),
    ("a Python object", "models: !!python/object/apply:os.system [id]", "not YAML"),
    ("a Python name", "models: !!python/name:os.system", "not YAML"),
    ("an unknown tag", "models: !x 1", "not YAML"),
    ("an impossible date", "models: 2001-99-99", "not YAML"),
    ("deep YAML", "models: " + "[" * DEEP, "not YAML"),
    ("an alias of itself", "models: &a [*a]", "one that contains itself"),
    ("aliases of aliases", f"models: {LAUGHS}", "more than 100,000 values"),
    ("a missing alias", "models: *missing", "not YAML"),
    ("a list as name", "{[1]: 2}", "not YAML"),
    ("an escaped surrogate", 'out: "\\ud800"', "not YAML"),
    ("an unknown key", matrix(modles={}), "modles: not one of"),
    ("a number as key", "7: 8", "7: not one of"),
    ("no models", matrix(models={}), "models: name at least one"),
    ("models as list", matrix(models=["m"]), "models: name at least one"),
    ("a model as text", matrix(models={"m": "llm"}), "'llm' is not a mapping"),
    ("no tasks", matrix(tasks=[]), "tasks: name at least one task"),
    ("a number as task", matrix(tasks=[7]), "tasks: name at least one task"),
    ("options as list", matrix(options=[1]), "is not a mapping"),
    ("an unknown option", matrix(options={"use_cache": "x"}), "use_cache: not one of"),
    ("a number as folder", matrix(out=7), "out: 7 is not the name of a folder"),
    ("NUL in a folder", matrix(out="a\0"), "is not the name of a folder"),
    ("a comma", matrix(models={"m": {"model": "hf", "pretrained": "a,b=c"}}), "has a comma"),
    ("a mapping as argument", matrix(models={"m": {"model": "hf", "pretrained": {"a": 1}}}), "cannot be an argument"),
    ("NUL in an argument", matrix(models={"m": {"model": "hf", "pretrained": "a\0"}}), "cannot be an argument"),
    ("a number as class", matrix(models={"m": {"model": 7}}), "is not the name of a model class"),
    ("dots as a name", matrix(models={"..": {"model": "hf"}}), "cannot be the name of a folder"),
    ("an empty name", matrix(models={"": {"model": "hf"}}), "cannot be the name of a folder"),
    ("a long name", matrix(models={"m" * 300: {"model": "hf"}}), "cannot be the name of a folder"),
    ("one folder for two", matrix(models={"a/b": {"model": "hf"}, "a:b": {"model": "x"}}), "two of them would write"),
    ("an unknown mode", matrix(models={"m": {"modes": ["magic"]}}), "not one of"),
    ("a mode as text", matrix(models={"m": {"modes": "rag"}}), "modes: give a list"),
    ("a mode as list", matrix(models={"m": {"modes": [["rag"]]}}), "not one of"),
    ("K of 0", matrix(models={"m": {"modes": ["rag"], "num_passages": [0]}}), "give a whole number of at least 1"),
    ("seed -1", matrix(models={"m": {"modes": ["rag"], "seeds": [-1]}}), "give a whole number of at least 0"),
    ("no hypernetwork", matrix(models={"m": {"modes": ["genpoe"]}}), "needs hypernetwork: DIRECTORY"),
]


def report(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda valid: valid | changes


def config(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda valid: valid | {"config": valid["config"] | changes}


RESULTS: list[tuple[str, Callable[[dict[str, Any]], Any], str]] = [
    ("results as list", lambda valid: [valid], "an object missing"),
    ("results without configs", lambda valid: {k: v for k, v in valid.items() if k != "configs"}, "configs missing"),
    ("config as list", report(config=[]), "config is not an object"),
    ("no tasks in results", report(configs={}), "nothing to compare"),
    ("a task as text", report(configs={"t": "task"}), "its configuration is not in lm_eval's format"),
    ("another task", report(configs={"u": {}}), "no file of samples"),
    ("a task above", report(configs={"../t": {}}), "not in lm_eval's format"),
    ("a number as model", config(model=7), "a wrong value of config.model"),
    ("arguments as list", config(model_args=[1]), "a wrong value of config.model_args"),
    ("a number as genpoe", config(genpoe=7), "a wrong value of config.genpoe"),
    ("a command as list", config(genpoe={"provenance": {"command": []}}), "config.genpoe.provenance.command"),
    ("seconds of words", config(genpoe={"seconds": {"a": "b"}}), "a wrong value of config.genpoe.seconds"),
    ("a time of words", report(total_evaluation_time_seconds="long"), "a wrong value of total_evaluation_time"),
    ("another number of samples", report(**{"n-samples": {"t": {"effective": 9}}}), "has 4 of 9 questions"),
    ("other hashes", report(task_hashes={"t": "0"}), "does not belong to these results"),
    ("another mean", report(results={"t": {"em,none": 0.1}}), "em is 0.1000 in the results"),
    ("no metric", report(results={"t": {}}), "no metric that is a mean"),
]
OPTIONS: list[tuple[str, str]] = [
    ("retrieve --index {index} --questions {questions} --out {out}/o --num-retrieved 0", "--num-retrieved"),
    ("retrieve --index {index} --questions {questions} --out {out}/o --format xml", "--format"),
    ("retrieve --index {index} --questions {questions}", "--out"),
    ("retrieve --index {index} --questions {questions} --out {out}", "a directory; give the name of a file"),
    ("retrieve --index {index} --questions {missing} --out {out}/o", "missing: no such file"),
    ("retrieve --index {index} --questions {long} --out {out}/o", "File name too long"),
    ("retrieve --index {missing} --questions {questions} --out {out}/o", "missing: no such directory"),
    ("retrieve --index {index}+{missing} --questions {questions} --out {out}/o", "missing: no such directory"),
    ("retrieve --index + --questions {questions} --out {out}/o", "no such directory"),
    ("retrieve --index {folder} --questions {questions} --out {out}/o", "not an index (no index.json)"),
    ("retrieve --index {index} --encoder x --questions {questions} --out {out}/o", "of its indexes have an encoder"),
    ("retrieve --run {run} --questions {questions} --out {out}/o", "a run has no texts"),
    ("retrieve --index {index} --questions {index} --out {out}/o", "index: no such file"),
    ("data download nothing --out {out}/d", "nothing"),
    ("data reranker {questions} --out {out}/o --negatives 0", "must be 1 <= min_negatives"),
    ("data reranker {missing} --out {out}/o", "missing: no such file"),
    ("data conflicts --questions {missing} --out {out}/o", "missing: no such file"),
    ("index build --out {out}/o", "give --passages and --encoder"),
    ("index build --passages {passages} --out {out}/o", "--passages needs --encoder"),
    ("index build --retriever bm25 --out {out}/o", "--retriever bm25 needs --passages"),
    ("index build --retriever bm25 --passages {passages} --out {out}/o --b 2", "--b"),
    ("index build --retriever bm25 --passages {passages} --out {out}/o --k1 -1", "--k1"),
    ("index build --retriever bm25 --passages {passages} --out {out}/o --k1 much", "--k1"),
    ("index build --retriever bm25 --passages {passages} --out {out}/o --factory Flat", "--factory: an option for"),
    ("index build --retriever bm25 --passages {passages} --out {folder}", "holds something that is not an index"),
    ("index build --retriever magic --passages {passages} --out {out}/o", "--retriever"),
    ("index build --shards {missing} --out {out}/o", "not a folder of shards"),
    ("index build --shards {index} --out {out}/o --memory lots", "is not a size such as 16GB"),
    ("index build --shards {index} --out {out}/o --recall 0", "--recall"),
    ("index info {missing}", "not an index (no index.json)"),
    ("index info {questions}", "not an index (no index.json)"),
    ("index tune {missing} --shards {missing}", "not an index (no index.json)"),
    ("experts create --llm x --out {out}/o --layers a", "--layers"),
    ("experts create --llm x --out {out}/o --layers 1 --calibrate {questions}", "leave out --layers or --calibrate"),
    ("experts create --llm x --out {out}/o --keep 0.5", "need --calibrate QUESTIONS"),
    ("experts create --llm x --out {out}/o --calibrate {questions}", "needs --max-layers, --max-bytes or --keep"),
    ("experts create --llm x --out {out}/o --keep 2", "--keep"),
    ("compare", "give RESULTS"),
    ("compare {missing}", "no such file or folder"),
    ("compare {folder}", "no lm_eval results"),
    ("compare --run {missing}", "missing: no such file"),
    ("compare --run {folder}", "no such file"),
    ("compare {long}", "File name too long"),
    ("compare {results} --jobs 0", "--jobs"),
    ("compare {results} --out {questions}", "--out"),
    ("magic", "No such command"),
    ("index magic", "No such command"),
    ("index info {index} --quickly", "No such option"),
]


def cases() -> Iterator[Any]:
    def rows(kind: str, command: str, entries: list[Any], name: str = "bad") -> Iterator[Any]:
        for label, content, said in entries:
            yield pytest.param(command, name, content, said, id=f"{kind}: {label}")

    conflicts = "data conflicts --questions {bad} --out {out}/o.jsonl"
    build = "index build --retriever bm25 --passages {bad} --out {out}/index"
    with_run = "retrieve --run {bad} --passages {passages} --questions {questions} --out {out}/o.jsonl"
    with_qrels = "retrieve --index {index} --questions {questions} --qrels {bad} --out {out}/o.jsonl"
    yield from rows("questions", conflicts, TEXTS + QUESTIONS)
    yield from rows("passages", build, [row for row in TEXTS if "version" not in row[0]] + PASSAGES)
    yield from rows("run", with_run, RUNS[:-1])
    yield from rows("run", with_run, RUNS[-1:], "bad.gz")
    yield from rows("qrels", with_qrels, QRELS)
    yield from rows("index", "index info {bad}", MANIFESTS, "bad/index.json")
    yield from rows("matrix", "compare --run {bad} --out {out}/page", MATRICES)
    yield from rows("results", "compare {bad} --out {out}/page", RESULTS, "bad/report")
    for command, said in OPTIONS:
        yield pytest.param(command, None, b"", said, id=f"options: {command[:60]}")


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Valid files by name, and names of what is not there."""
    root = tmp_path_factory.mktemp("valid")
    passages = [Passage(f"p{number}", "Title", f"Text number {number}.") for number in range(3)]
    build_bm25(passages, root / "index", progress=False)
    for name, text in (
        ("passages", "".join(json.dumps({"id": p.id, "title": p.title, "text": p.text}) + "\n" for p in passages)),
        ("questions", "".join(json.dumps({"question": f"who {n}", "answer": ["a"]}) + "\n" for n in range(3))),
        ("run", "1 Q0 p1 1 2.5 tag\n"),
        ("folder/file", "not ours"),
    ):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text)
    write_run(root / "results", {"em": [1.0, 0.0, 1.0, 0.0]}, docs=documents(4))
    names = ("index", "passages", "questions", "run", "folder", "results", "missing")
    return {**{name: root / name for name in names}, "long": root / ("x" * 300)}


def _write(content: Any, path: Path, valid: dict[str, Path]) -> None:
    path.parent.mkdir(exist_ok=True)
    if callable(content):  # a change of a report
        for file in (valid["results"] / "model").iterdir():
            text = file.read_text()
            changed = json.dumps(content(json.loads(text))) if file.name.startswith("results") else text
            (path.parent / file.name).write_text(changed)
        return
    if path.name == "index.json":
        for name in ("index.faiss", "passages.arrow"):
            (path.parent / name).touch()
    path.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)


@pytest.mark.parametrize(("command", "name", "content", "said"), cases())
def test_one_line_and_nothing_written(
    command: str,
    name: str | None,
    content: Any,
    said: str,
    valid: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    bad = tmp_path / (name or "bad")
    if name is not None:
        _write(content, bad, valid)
    before = sorted(tmp_path.rglob("*"))
    places = {key: str(path) for key, path in valid.items()} | {"out": str(tmp_path / "out")}
    places["bad"] = str(bad.parent if bad.name in ("index.json", "report") else bad)
    result = CliRunner().invoke(main, [word.format(**places) for word in command.split()], prog_name="genpoe")
    assert result.exit_code == 2, (result.output, result.exception)
    lines = [line for line in result.stderr.splitlines() if line and "passage/s]" not in line]  # no progress bars
    usage = lines[0].startswith("Usage: ")
    assert usage or len(lines) == 1, result.stderr
    assert lines[-1].startswith("Error: " if usage else "error: ") and lines[-1].isprintable()
    assert said in lines[-1], result.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_the_table_is_long_and_its_inputs_differ() -> None:
    rows = [row.values for row in cases()]
    assert len({(command, str(content)) for command, _, content, _ in rows}) == len(rows) >= 200


def test_a_gzip_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    """A line of 800 million characters in less than a megabyte."""
    import tracemalloc

    bomb = tmp_path / "bomb.jsonl.gz"
    bomb.write_bytes(gzip.compress(b'{"question": "') + gzip.compress(bytes([120]) * (1 << 20), 9) * 800)
    assert bomb.stat().st_size < 1 << 20
    tracemalloc.start()
    try:
        result = CliRunner().invoke(main, ["data", "conflicts", "--questions", str(bomb), "--out", str(tmp_path / "o")])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert result.exit_code == 2 and "longer than 16,777,216 characters" in result.stderr
    assert peak < 200_000_000
