"""A tiny LLM with a loud random hypernetwork, docs with and without passages, and the arithmetic done by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from genpoe_plugin.checkpoints.checkpoint import load_hypernetwork, save_hypernetwork
from genpoe_plugin.data.passages import Passage
from genpoe_plugin.experts.config import HypernetworkConfig
from genpoe_plugin.experts.hypernetwork import Hypernetwork
from genpoe_plugin.indexing.encoding import index_passages
from genpoe_plugin.lm.hf import GenPoELM
from genpoe_plugin.prompts import closed_book_prompt
from genpoe_plugin.registration import task_folder

LAYER = 1
FACTS = [
    ("Rossini", "Gioachino Rossini was an Italian composer born in Pesaro in 1792."),
    ("Marie Curie", "Marie Curie discovered polonium and radium, and won two Nobel prizes."),
    ("Canberra", "Canberra is the capital of the country and was founded in 1913."),
    ("", "The quick brown fox jumps over the lazy dog in Zürich."),
    ("Pesaro", "Pesaro is where a barber wrote an opera."),
]


def _doc(question: str, *passages: int, answers: Sequence[str] = ("Pesaro",)) -> dict[str, Any]:
    """A doc in the form of DPR results; rerank scores come along, so gates are not all alike."""
    ctxs = [
        {
            "id": str(n),
            "title": FACTS[n][0],
            "text": FACTS[n][1],
            "score": str(9.5 - rank),
            "rerank_score": 1.0 - rank / 2,
        }
        for rank, n in enumerate(passages)
    ]
    return {"question": question, "answers": list(answers), "ctxs": ctxs}


@pytest.fixture(scope="session")
def docs() -> list[dict[str, Any]]:
    return [
        _doc("who wrote the opera about a barber", 0, 4),
        _doc("where is the capital of the country", 2),
        _doc("who won two prizes", 1, 0, 3, 2),
        _doc("who jumps over the dog in the Swiss city of Zürich"),
        _doc("where was the Italian composer born", 4, 3, 0),
        _doc("when was it founded", 2, 1),
    ]


def _generation(docs: Sequence[dict[str, Any]], **gen_kwargs: Any) -> list[Instance]:
    gen_kwargs = {"until": ["\n"], "max_gen_toks": 8, "do_sample": False} | gen_kwargs
    return [
        Instance("generate_until", doc, (closed_book_prompt(doc["question"]), gen_kwargs), 0, ("qa", number, 1))
        for number, doc in enumerate(docs)
    ]


def _choices(docs: Sequence[dict[str, Any]]) -> list[Instance]:
    return [
        Instance("loglikelihood", doc, (closed_book_prompt(doc["question"]), choice), i, ("mc", number, 1))
        for number, doc in enumerate(docs)
        for i, choice in enumerate((" Rossini", " Canberra, 1913", " a"))
    ]


@pytest.fixture(scope="session")
def llm(make_llm):
    return make_llm("llama")


@pytest.fixture(scope="session")
def make_hypernetwork_dir(tmp_path_factory, llm, tokenizer) -> Callable[..., Path]:
    """``make(**form)``: a checkpoint with random base and large output, so that its experts change every answer."""

    def make(**form: Any) -> Path:
        values = {"hidden_size": 32, "layer": LAYER, "rank": 4, "core_size": 6, "expert_width": 16, "code_size": 16}
        config = HypernetworkConfig.from_dict({**values, "base": "random", "generator_gain": 3.0, **form})
        torch.manual_seed(5)
        directory = tmp_path_factory.mktemp("checkpoint") / "hypernetwork"
        save_hypernetwork(directory, Hypernetwork(config), llm, tokenizer, {})
        return directory

    return make


@pytest.fixture(scope="session")
def hypernetwork_dir(make_hypernetwork_dir) -> Path:
    return make_hypernetwork_dir()


@pytest.fixture(scope="session")
def make_lm(llm, tokenizer, hypernetwork_dir) -> Callable[..., GenPoELM]:
    def make(mode: str = "genpoe", **options: Any) -> GenPoELM:
        if mode.startswith("genpoe"):
            options.setdefault("hypernetwork", str(hypernetwork_dir))
        options = {"pretrained": llm, "tokenizer": tokenizer, "device": "cpu", "batch_size": 4} | options
        return GenPoELM(mode=mode, **options)

    return make


class ByHand:
    """The LLM with experts, one prompt at a time, without cache, padding, or any code of ours but the hypernetwork."""

    def __init__(self, llm, tokenizer, directory: Path, one_expert) -> None:
        self.llm, self.tokenizer, self.one_expert = llm, tokenizer, one_expert
        self.network = load_hypernetwork(directory, llm, tokenizer)

    @torch.no_grad()
    def states(self, passage: str) -> torch.Tensor:
        if self.network.config.states == "contextual":
            ids = torch.tensor([self.tokenizer(passage)["input_ids"][:257]])
            return self.llm(ids, output_hidden_states=True).hidden_states[LAYER][:, 1:]
        return self.llm.get_input_embeddings()(
            torch.tensor([self.tokenizer(passage, add_special_tokens=False)["input_ids"][:256]])
        )

    def logits(self, ids: list[int], passages: Sequence[str], gates: Sequence[float], start: int) -> torch.Tensor:
        experts = []
        for passage in passages:
            states = self.states(passage)
            experts.append(self.network(states, torch.ones(states.shape[:2], dtype=torch.bool))[0])

        def branch(module, args, output):
            for position in range(start, len(ids)):
                for gate, expert in zip(gates, experts, strict=True):
                    output[0, position] += (gate * self.one_expert(expert, args[0][0, position])).float()
            return output

        handle = self.llm.model.layers[LAYER].mlp.register_forward_hook(branch)
        try:
            with torch.no_grad():
                return self.llm(torch.tensor([ids])).logits[0]
        finally:
            handle.remove()

    def generate(self, prompt: str, passages, gates, start: int, tokens: int = 8) -> tuple[str, float]:
        """The greedy answer's first line, and the smallest gap between the two best logits on the way."""
        ids = self.tokenizer(prompt)["input_ids"]
        new: list[int] = []
        gap = float("inf")
        while len(new) < tokens and self.tokenizer.eos_token_id not in new:
            logits = self.logits(ids + new, passages, gates, start)[-1]
            best = logits.topk(2).values
            gap = min(gap, float(best[0] - best[1]))
            new.append(int(logits.argmax()))
        return self.tokenizer.decode(new, skip_special_tokens=True).split("\n")[0], gap

    def score(self, prompt: str, continuation: str, passages, gates, start: int) -> float:
        context = self.tokenizer(prompt)["input_ids"]
        whole = self.tokenizer(prompt + continuation)["input_ids"]
        logprobs = self.logits(whole[:-1], passages, gates, start).double().log_softmax(-1)
        return float(sum(logprobs[i - 1, whole[i]] for i in range(len(context), len(whole))))


@pytest.fixture(scope="session")
def make_by_hand(llm, tokenizer, one_expert) -> Callable[[Path], ByHand]:
    return lambda directory: ByHand(llm, tokenizer, directory, one_expert)


@pytest.fixture(scope="session")
def by_hand(make_by_hand, hypernetwork_dir) -> ByHand:
    return make_by_hand(hypernetwork_dir)


def _expected_row(doc: dict[str, Any], most: int = 4) -> tuple[list[str], list[float]]:
    """The strings and gates of a doc made by `make_doc`, whose passages are best first already."""
    kept = doc["ctxs"][:most]
    strings = [f"{ctx['title']}: {ctx['text']}" if ctx["title"] else ctx["text"] for ctx in kept]
    gates = torch.tensor([ctx["rerank_score"] for ctx in kept], dtype=torch.float64).softmax(0).tolist()
    return strings, gates


@pytest.fixture(scope="session")
def make_doc():
    return _doc


@pytest.fixture(scope="session")
def generation():
    """``generation(docs, **gen_kwargs)``: a request to generate for each doc."""
    return _generation


@pytest.fixture(scope="session")
def choices():
    """``choices(docs)``: three continuations to score for each doc."""
    return _choices


@pytest.fixture(scope="session")
def expected_row():
    return _expected_row


@pytest.fixture(scope="session")
def docs_file(tmp_path_factory, docs) -> Path:
    """`docs` as the JSON Lines file that the tasks read."""
    path = tmp_path_factory.mktemp("docs") / "docs.jsonl"
    path.write_text("".join(json.dumps(doc) + "\n" for doc in docs), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def fact_strings() -> dict[str, str]:
    """The strings of FACTS by passage id."""
    return {str(n): f"{title}: {text}" if title else text for n, (title, text) in enumerate(FACTS)}


@pytest.fixture(scope="session")
def index_dir(tmp_path_factory) -> Path:
    """An index over FACTS, with an encoder that has a vector for each word and nothing else."""
    # Imported here because they take seconds, which other tests do without.
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    from genpoe_plugin.retrieval.encoder import load_encoder

    directory = tmp_path_factory.mktemp("index")
    vocabulary = sorted({word.lower() for fact in FACTS for word in re.findall(r"\w+", " ".join(fact))})
    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate(["[UNK]", *vocabulary])}, unk_token="[UNK]"))
    words.normalizer, words.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = SentenceTransformer(modules=[StaticEmbedding(words, embedding_dim=32)], device="cpu")
    encoder.save(str(directory / "encoder"))
    passages = [Passage(str(n), title, text) for n, (title, text) in enumerate(FACTS)]
    index_passages(passages, load_encoder(str(directory / "encoder")), directory / "index", progress=False)
    return directory / "index"


_TASKS = {
    "local_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "Q: {{q}}\nA:",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_mutual_info"}],
    },
    "local_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
    "local_text": {
        "output_type": "generate_until",
        "doc_to_text": "{{q}} ->",
        "doc_to_target": "{{choices[gold]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6},
        "metric_list": [{"metric": "exact_match"}],
    },
}
_ROWS = [
    ("who composed the barber of Seville", ["Rossini", "Curie", "Canberra"], 0, "Gioachino Rossini was a composer."),
    ("who found radium", ["Rossini", "Marie Curie", "a dog"], 1, "Marie Curie discovered polonium. " * 4),
    ("capital of the country", ["Pesaro", "Zürich", "Canberra"], 2, "Canberra was founded in 1913."),
]


@pytest.fixture(scope="session")
def local_tasks(tmp_path_factory) -> Path:
    """A folder with three tasks that know nothing of us: choices, running text, and generation."""
    directory = tmp_path_factory.mktemp("tasks")
    rows = [{"q": q, "choices": choices, "gold": gold, "text": text} for q, choices, gold, text in _ROWS]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = {"data_files": {"test": str(directory / "rows.jsonl")}, "cache_dir": str(directory / "cache")}
    for name, task in _TASKS.items():
        content = {"task": name, "dataset_path": "json", "dataset_kwargs": options, "test_split": "test", **task}
        (directory / f"{name}.yaml").write_text(json.dumps(content), encoding="utf-8")
    return directory


@pytest.fixture(scope="session")
def evaluate(docs_file, local_tasks) -> Callable[..., dict[str, Any]]:
    """``evaluate(lm, *tasks, **options)``: what `simple_evaluate` returns, with tasks of ours and of `local_tasks`."""

    def run(lm: GenPoELM, *tasks: str, **options: Any) -> dict[str, Any]:
        manager = TaskManager(
            include_path=[str(task_folder()), str(local_tasks)],
            include_defaults=False,
            metadata={"genpoe_data": str(docs_file)},
        )
        options = {"bootstrap_iters": 0, "log_samples": True} | options
        return lm_eval.simple_evaluate(lm, tasks=list(tasks), task_manager=manager, **options)

    return run
