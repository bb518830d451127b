"""Every long command on tiny models and data, with what it leaves behind: `faults` disturbs them."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

from benchmarks.forked import Forked
from genpoe_plugin.files import TEMPORARY

PASSAGES, QUESTIONS, WORDS = 600, 24, 12


@dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
        name: name for messages.
        words: its words; the first is ``genpoe`` or ``lm_eval``. Paths are relative to the folder of the world.
    """

    name: str
    words: tuple[str, ...]

    def run(self) -> None:
        """Run the command in this process, which ends with it."""
        program, *arguments = self.words
        if program == "genpoe":
            _genpoe(arguments)
        else:
            _lm_eval(arguments)


def _command(name: str, text: str) -> Command:
    return Command(name, tuple(text.split()))


_EVALUATION = (
    "lm_eval --model genpoe --tasks genpoe_demo --device cpu --batch_size 4 --gen_kwargs max_gen_toks=4"
    ' --metadata {"genpoe_data":"docs.jsonl"} --log_samples --output_path out/results --use_cache out/cache'
    " --model_args pretrained=llm,hypernetwork=experts,mode=genpoe,num_passages=2,expert_store=out/store"
    ",trace=out/trace.jsonl"
)
_TRAINING = "--max-steps 6 --save-every 2 --validate-every 3 --batch-size 2 --device cpu --out out/trained"
COMMANDS = (
    _command(
        "train hypernetwork",
        "genpoe train hypernetwork --model llm --data docs.jsonl --validation few.jsonl --preset memory --rank 4 "
        + _TRAINING,
    ),
    _command(
        "train reranker",
        "genpoe train reranker --model llm --data pairs.jsonl --validation pairs.jsonl --lora-rank 2 "
        f"--lora-targets q_proj,v_proj {_TRAINING}",
    ),
    _command(
        "index encode",
        "genpoe index encode --passages passages.tsv --encoder encoder --shard-size 50 --out out/shards",
    ),
    _command(
        "index build",
        "genpoe index build --passages passages.tsv --encoder encoder --shard-size 100 --factory IVF8,Flat "
        "--out out/index",
    ),
    _command("index build, BM25", "genpoe index build --retriever bm25 --passages passages.tsv --out out/index"),
    _command(
        "retrieve",
        "genpoe retrieve --index index --questions docs.jsonl --num-retrieved 5 --reranker llm --reranker-format bge "
        "--write-qrels out/qrels.txt --out out/found.jsonl",
    ),
    _command("rerank", "genpoe rerank docs.jsonl --reranker llm --reranker-format bge --out out/reranked.jsonl"),
    _command("lm_eval", _EVALUATION),
    _command("compare --run", "genpoe compare --run matrix.yaml"),
)


def make_world(folder: Path) -> None:
    """Write models, data, an index and a checkpoint into ``folder``. Computes, so run it in a forked process."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    from genpoe_plugin.checkpoints.checkpoint import save_hypernetwork
    from genpoe_plugin.data.passages import Passage
    from genpoe_plugin.experts.config import HypernetworkConfig
    from genpoe_plugin.experts.hypernetwork import Hypernetwork
    from genpoe_plugin.indexing.bm25_building import build_bm25

    rng = random.Random(0)
    passages = [Passage(str(n), _text(rng, 2), _text(rng, 3 * WORDS)) for n in range(PASSAGES)]
    model, tokenizer = _llm([passage.string for passage in passages])
    model.save_pretrained(folder / "llm")
    tokenizer.save_pretrained(folder / "llm")
    torch.manual_seed(0)
    SentenceTransformer(modules=[StaticEmbedding(tokenizer._tokenizer, embedding_dim=16)], device="cpu").save(
        str(folder / "encoder")
    )
    config = HypernetworkConfig.preset("memory", hidden_size=32, layer=1, rank=4)
    save_hypernetwork(folder / "experts", Hypernetwork(config), model, tokenizer, training={})
    lines = ["id\ttext\ttitle", *(f"{p.id}\t{p.text}\t{p.title}" for p in passages)]
    (folder / "passages.tsv").write_text("\n".join(lines) + "\n")
    build_bm25(folder / "passages.tsv", folder / "index", progress=False)
    docs = []
    for number in range(QUESTIONS):
        found = passages[4 * number : 4 * number + 4]
        words = found[0].text.split()
        contexts = [
            {"id": p.id, "title": p.title, "text": p.text, "score": str(9.0 - rank), "rerank_score": 1 - rank / 2}
            for rank, p in enumerate(found)
        ]
        docs.append({"question": f"Who {' '.join(words[:5])} ?", "answers": [words[6]], "ctxs": contexts})
    _write_lines(folder / "docs.jsonl", docs)
    _write_lines(folder / "few.jsonl", docs[:2])
    pairs = [
        {
            "query": doc["question"],
            "pos": [doc["ctxs"][0]["text"]],
            "neg": [context["text"] for context in doc["ctxs"][1:]],
            "prompt": "Who ?",
        }
        for doc in docs[:6]
    ]
    _write_lines(folder / "pairs.jsonl", pairs)
    matrix = {
        "out": "out/runs",
        "tasks": "genpoe_demo",
        "options": {
            **{"device": "cpu", "batch_size": 8, "gen_kwargs": {"max_gen_toks": 4}},
            "metadata": {"genpoe_data": "docs.jsonl"},
        },
        "model_args": {"pretrained": "llm", "hypernetwork": "experts", "expert_store": "out/store"},
        "models": {"m": {"modes": ["closed_book", "genpoe"], "num_passages": [2]}},
    }
    (folder / "matrix.yaml").write_text(yaml.safe_dump(matrix))


def _text(rng: random.Random, words: int) -> str:
    return " ".join(f"w{rng.randrange(300)}" for _ in range(words))


def _llm(texts: list[str]) -> tuple[Any, Any]:
    """A tiny random Llama and its tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=700, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>", pad_token="</s>", padding_side="left")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval(), tokenizer


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def _genpoe(arguments: list[str]) -> None:
    from genpoe_plugin.comparison import matrix
    from genpoe_plugin.selection import result_files
    from train_cli.main import run

    matrix.subprocess = _LmEvalRuns()  # type: ignore[attr-defined]
    result_files.SCORE_BLOCK = 16  # so that some kills are between blocks
    sys.argv = ["genpoe", *arguments]
    run()


def _lm_eval(arguments: list[str]) -> None:
    from lm_eval import evaluator
    from lm_eval._cli import HarnessCLI
    from lm_eval.tasks._index import TaskIndex

    from genpoe_plugin import registration

    # Reading thousands of task files, and asking the machine about itself, is most of what a tiny run does.
    build = TaskIndex.build
    TaskIndex.build = staticmethod(lambda _, **options: build([registration.task_folder()], **options))
    evaluator.add_env_info = lambda results: None
    sys.modules["__main__"].__spec__ = None
    sys.argv = ["lm_eval", *arguments]
    registration.errors_in_one_line()
    cli = HarnessCLI()
    cli.execute(cli.parse_args())


class _LmEvalRuns:
    """Stands in for the module `subprocess` in `compare --run`: its lm_eval runs are forked as well.

    They are forked by a process of their own, because that of `compare --run` has threads.
    """

    DEVNULL = None

    def __init__(self) -> None:
        self._server, server = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        Forked(lambda: _serve_lm_eval(server, self._server), Path(os.devnull), own_group=False)
        server.close()

    def Popen(self, command: list[str], *, stdout: Any, pass_fds: list[int], **_: Any) -> Any:
        words = command[command.index("lm_eval") + 1 :]
        socket.send_fds(self._server, [json.dumps([stdout.name, words]).encode()], pass_fds)
        pid = int(self._server.recv(64) or 0)

        def kill() -> None:
            if pid:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

        return SimpleNamespace(wait=lambda: int(self._server.recv(64) or -signal.SIGINT), kill=kill)


def _serve_lm_eval(requests: socket.socket, other_end: socket.socket) -> None:
    other_end.close()
    while True:
        message, files, *_ = socket.recv_fds(requests, 1 << 16, 4)
        if not message:  # `compare --run` has ended
            return
        log, words = json.loads(message)
        child = Forked(lambda words=words: _lm_eval(words), Path(log), own_group=False)
        for file in files:
            os.close(file)
        requests.send(str(child.pid).encode())
        requests.send(str(child.wait()).encode())


def left_behind(out: Path) -> dict[str, object]:
    """What a command has left in ``out``, by file, without what differs between any two runs.

    Files are compared byte for byte, with these exceptions:

    - lm_eval puts the date into the names of its results and samples, which is left out;
    - of its results file (times, dates, machine), the scores and the configuration of the tasks count,
      without the addresses of functions;
    - of its response cache (an SQLite file), the entries count; of an expert store, whose files have random names, the
      experts by passage; of lm_eval's log, which has times, nothing;
    - temporary files of an expert store and of a trace, which several processes may write, do not count;
    - of the comparison, the scores, intervals and tests count, not the costs, which are times.
    """
    found: dict[str, object] = {}
    for path in sorted(path for path in out.rglob("*") if path.is_file() and not _is_shared_temporary(path, out)):
        name = re.sub(r"_\d{4}-\d\d-\d\dT[\d.-]+(?=\.json)", "_DATE", str(path.relative_to(out)))
        if name.startswith("store/"):
            found.setdefault("store", {}).update(_experts(path))  # type: ignore[attr-defined]
        elif path.name.endswith(".db"):
            found[name] = _entries(path)
        elif path.name.startswith("results_"):
            found[name] = _scores(path)
        elif path.name == "comparison.json":
            found[name] = _without_times(json.loads(path.read_text()))
        elif "comparison/" not in name and path.name != "lm_eval.log":
            found[name] = path.read_bytes()
        else:
            found[name] = None
    return found


def _is_shared_temporary(path: Path, out: Path) -> bool:
    name = str(path.relative_to(out))
    return path.suffix == TEMPORARY and name.startswith(("store/", ".trace.jsonl."))


def _scores(path: Path) -> Any:
    try:
        report = json.loads(re.sub(r" at 0x[0-9a-f]+", "", path.read_text()))
    except ValueError:  # cut short; a later, complete file has the same name but for the date
        return "damaged"
    return {key: report[key] for key in ("results", "configs", "versions", "n-shot", "n-samples")}


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_times(inner) for key, inner in value.items() if key not in ("cost", "summary", "runs")}
    return [_without_times(inner) for inner in value] if isinstance(value, list) else value


def _experts(path: Path) -> dict[str, list[bytes]]:
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        names = json.loads(file.metadata()["passages"])
        tensors = [file.get_tensor(name) for name in sorted(file.keys())]
    return {name: [tensor[row].tobytes() for tensor in tensors] for row, name in enumerate(names)}


def _entries(path: Path) -> dict[str, Any]:
    from sqlitedict import SqliteDict

    with SqliteDict(str(path), flag="r") as entries:
        return dict(entries)
