"""Resources that can be downloaded; DPR's files have the names of DPR's own downloader."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from genpoe_plugin.data.download import download
from genpoe_plugin.data.hub_questions import (
    HOTPOT_QA,
    MQUAKE,
    NARRATIVE_QA,
    NQ_OPEN,
    NQ_SWAP,
    POP_QA,
    SQUAD,
    SQUAD_2,
    TRIVIA_QA,
    TWO_WIKI,
    read_hub_questions,
)
from genpoe_plugin.data.questions import write_questions
from genpoe_plugin.errors import InputError

_DPR = "https://dl.fbaipublicfiles.com/dpr/"
_HUB = "hub:"
_MQUAKE = "https://raw.githubusercontent.com/princeton-nlp/MQuAKE/main/datasets/"
_TRIVIA = "see nlp.cs.washington.edu/triviaqa"
_LICENCES = {
    "Wikipedia": "CC BY-SA",
    "NQ": "CC BY-SA 3.0",
    "NQ-open": "CC BY-SA 3.0",
    "TriviaQA": _TRIVIA,
    "TriviaQA unfiltered": _TRIVIA,
    "SQuAD v1.1": "CC BY-SA 4.0",
    "SQuAD v2.0": "CC BY-SA 4.0",
    "NQ-Swap": "MIT, text CC BY-SA 3.0",
    "WebQuestions": "see nlp.stanford.edu/software/sempre",
    "CuratedTREC": "see trec.nist.gov/data/qa.html",
    "PopQA": "MIT",
    "NarrativeQA": "Apache-2.0, summaries CC BY-SA 3.0",
    "HotpotQA": "CC BY-SA 4.0",
    "2WikiMultihopQA": "Apache-2.0",
    "MQuAKE": "MIT",
    "MQuAKE-Remastered": "CC BY 4.0",
}


@dataclass(frozen=True, slots=True)
class Resource:
    """A file that can be downloaded.

    Attributes:
        name: name of the resource.
        address: a URL, or ``hub:DATASET/SPLIT``.
        kind: content of the file: "passages" (for `read_passages`), "questions" or "questions with passages" (for
            `read_questions`).
        what: description for users.
        licence: licence of the data.
    """

    name: str
    address: str
    kind: str
    what: str
    licence: str

    def path(self, folder: str | Path) -> Path:
        """Path of the file in ``folder``, with one level per part of the name, as in DPR; ``.gz`` files stay packed."""
        parent, _, file = self.name.replace(".", "/").rpartition("/")
        suffixes = ".jsonl" if self.address.startswith(_HUB) else _suffixes(self.address)
        return Path(folder) / parent / f"{file}{suffixes}"


def _suffixes(url: str) -> str:
    """The suffixes of a file's type, such as ``.tsv.gz``, without other dots, as in ``nq-dev.qa.csv``."""
    return "".join(suffix for suffix in Path(url).suffixes if suffix in (".tsv", ".csv", ".json", ".gz"))


# For each group: kind, description, and its files: name after "data.", address after _DPR, data set and part.
_DPR_FILES = (
    (
        "passages",
        "21,015,324 passages of 100 words",
        (("wikipedia_split.psgs_w100", "wikipedia_split/psgs_w100.tsv.gz", "Wikipedia, December 2018"),),
    ),
    (
        "questions",
        "",
        (
            ("retriever.qas.nq-train", "data/retriever/nq-train.qa.csv", "NQ, train"),
            ("retriever.qas.nq-dev", "data/retriever/nq-dev.qa.csv", "NQ, dev"),
            ("retriever.qas.nq-test", "data/retriever/nq-test.qa.csv", "NQ, test"),
            ("retriever.qas.trivia-train", "data/retriever/trivia-train.qa.csv.gz", "TriviaQA, train"),
            ("retriever.qas.trivia-dev", "data/retriever/trivia-dev.qa.csv.gz", "TriviaQA, dev"),
            ("retriever.qas.trivia-test", "data/retriever/trivia-test.qa.csv.gz", "TriviaQA, test"),
            ("retriever.qas.squad1-test", "data/retriever/squad1-test.qa.csv", "SQuAD v1.1, test"),
            ("retriever.qas.webq-test", "data/retriever/webquestions-test.qa.csv", "WebQuestions, test"),
            ("retriever.qas.curatedtrec-test", "data/retriever/curatedtrec-test.qa.csv", "CuratedTREC, test"),
        ),
    ),
    (
        "questions with passages",
        "DPR's 100 best passages",
        (
            ("retriever_results.nq.single.train", "data/retriever_results/single/nq-train.json.gz", "NQ, train"),
            ("retriever_results.nq.single.dev", "data/retriever_results/single/nq-dev.json.gz", "NQ, dev"),
            ("retriever_results.nq.single.test", "data/retriever_results/single/nq-test.json.gz", "NQ, test"),
        ),
    ),
    (
        "questions with passages",
        "the best passages of DPR trained with its own hard negatives",
        (
            (
                "retriever_results.nq.single-adv-hn.test",
                "data/retriever_results/single-adv-hn/nq-test.json.gz",
                "NQ, test",
            ),
        ),
    ),
    (
        "questions with passages",
        "the annotators' passage",
        (
            ("gold_passages_info.nq_train", "data/nq_gold_info/nq-train_gold_info.json.gz", "NQ, train"),
            ("gold_passages_info.nq_dev", "data/nq_gold_info/nq-dev_gold_info.json.gz", "NQ, dev"),
            ("gold_passages_info.nq_test", "data/nq_gold_info/nq-test_gold_info.json.gz", "NQ, test"),
        ),
    ),
    (
        "questions with passages",
        "positives, and negatives from BM25",
        (
            ("retriever.nq-train", "data/retriever/biencoder-nq-train.json.gz", "NQ, train"),
            ("retriever.nq-dev", "data/retriever/biencoder-nq-dev.json.gz", "NQ, dev"),
            ("retriever.trivia-train", "data/retriever/biencoder-trivia-train.json.gz", "TriviaQA, train"),
            ("retriever.trivia-dev", "data/retriever/biencoder-trivia-dev.json.gz", "TriviaQA, dev"),
            ("retriever.squad1-train", "data/retriever/biencoder-squad1-train.json.gz", "SQuAD v1.1, train"),
            ("retriever.squad1-dev", "data/retriever/biencoder-squad1-dev.json.gz", "SQuAD v1.1, dev"),
            ("retriever.webq-train", "data/retriever/biencoder-webquestions-train.json.gz", "WebQuestions, train"),
            ("retriever.webq-dev", "data/retriever/biencoder-webquestions-dev.json.gz", "WebQuestions, dev"),
            ("retriever.curatedtrec-train", "data/retriever/biencoder-curatedtrec-train.json.gz", "CuratedTREC, train"),
            ("retriever.curatedtrec-dev", "data/retriever/biencoder-curatedtrec-dev.json.gz", "CuratedTREC, dev"),
        ),
    ),
    (
        "questions with passages",
        "positives, and negatives from DPR",
        (("retriever.nq-adv-hn-train", "data/retriever/biencoder-nq-adv-hn-train.json.gz", "NQ, train"),),
    ),
)
# Files of the authors of the other data sets.
_ORIGINALS = (
    (
        "questions with passages",
        (
            ("squad.train", "https://rajpurkar.github.io/SQuAD-explorer/dataset/train-v1.1.json", "SQuAD v1.1, train"),
            ("squad.dev", "https://rajpurkar.github.io/SQuAD-explorer/dataset/dev-v1.1.json", "SQuAD v1.1, dev"),
            (
                "hotpotqa.train",
                "http://curtis.ml.cmu.edu/datasets/hotpot/hotpot_train_v1.1.json",
                "HotpotQA, train; ten paragraphs",
            ),
            (
                "hotpotqa.dev",
                "http://curtis.ml.cmu.edu/datasets/hotpot/hotpot_dev_distractor_v1.json",
                "HotpotQA, dev; ten paragraphs",
            ),
            ("mquake.cf-3k", f"{_MQUAKE}MQuAKE-CF-3k-v2.json", "MQuAKE, CF-3k version 2; the edited facts"),
            ("mquake.cf", f"{_MQUAKE}MQuAKE-CF.json", "MQuAKE, CF; the edited facts"),
        ),
    ),
    (
        "questions",
        (
            (
                "popqa.test",
                "https://raw.githubusercontent.com/AlexTMallen/adaptive-retrieval/main/data/popQA.tsv",
                "PopQA, test",
            ),
        ),
    ),
)
_HUB_SPLITS = (
    ("hub.nq_open.train", f"{NQ_OPEN}/train", "NQ-open, train"),
    ("hub.nq_open.validation", f"{NQ_OPEN}/validation", "NQ-open, validation; what genpoe_nq asks"),
    ("hub.trivia_qa.train", f"{TRIVIA_QA}/train", "TriviaQA unfiltered, train"),
    ("hub.trivia_qa.validation", f"{TRIVIA_QA}/validation", "TriviaQA unfiltered, validation; what genpoe_tqa asks"),
    ("hub.popqa.test", f"{POP_QA}/test", "PopQA, test; what genpoe_popqa asks"),
)
_HUB_SPLITS_WITH_PASSAGES = (
    ("hub.squad.train", f"{SQUAD}/train", "SQuAD v1.1, train"),
    ("hub.squad.validation", f"{SQUAD}/validation", "SQuAD v1.1, validation; what genpoe_squad asks"),
    ("hub.squad_v2.validation", f"{SQUAD_2}/validation", "SQuAD v2.0, validation; what genpoe_unanswerable asks"),
    ("hub.nq_swap.dev", f"{NQ_SWAP}/dev", "NQ-Swap, dev; what genpoe_conflict asks"),
    ("hub.narrativeqa.test", f"{NARRATIVE_QA}/test", "NarrativeQA, test, gigabytes; what genpoe_narrativeqa asks"),
    ("hub.hotpotqa.train", f"{HOTPOT_QA}/train", "HotpotQA, train"),
    ("hub.hotpotqa.validation", f"{HOTPOT_QA}/validation", "HotpotQA, validation; what genpoe_hotpotqa asks"),
    ("hub.2wiki.train", f"{TWO_WIKI}/train", "2WikiMultihopQA, train"),
    ("hub.2wiki.validation", f"{TWO_WIKI}/validation", "2WikiMultihopQA, validation; what genpoe_2wiki asks"),
    ("hub.mquake.cf3k", f"{MQUAKE}/CF3k", "MQuAKE-Remastered, CF3k; what genpoe_mquake asks"),
)


def _resource(name: str, address: str, kind: str, what: str) -> Resource:
    return Resource(name, address, kind, what, licence=_LICENCES[what.split(",")[0]])


RESOURCES = (
    *(
        _resource(f"data.{name}", f"{_DPR}{address}", kind, f"{part}; {note}" if note else part)
        for kind, note, files in _DPR_FILES
        for name, address, part in files
    ),
    *(
        _resource(f"original.{name}", address, kind, what)
        for kind, files in _ORIGINALS
        for name, address, what in files
    ),
    *(
        _resource(name, f"{_HUB}{address}", kind, what)
        for kind, splits in (("questions", _HUB_SPLITS), ("questions with passages", _HUB_SPLITS_WITH_PASSAGES))
        for name, address, what in splits
    ),
)

_BUILD = "DPR's embeddings and indexes are pickles, which are not supported; build an index with `genpoe index build`"
_MODELS = (
    "DPR's checkpoints are pickles, which are not supported; its encoders are on the hub: `genpoe index build "
    "--encoder facebook/dpr-question_encoder-single-nq-base,facebook/dpr-ctx_encoder-single-nq-base`"
)

# Names that users may expect, and what to use instead.
UNAVAILABLE: dict[str, str] = {
    "data.retriever_results.trivia": "DPR publishes no results for TriviaQA; create them with `genpoe retrieve` from "
    "the questions, data.retriever.qas.trivia-train and so on",
    "data.retriever_results.nq.single.wikipedia_passages": _BUILD,
    "data.retriever_results.nq.single-adv-hn.wikipedia_passages": _BUILD,
    "data.reader": "the data of DPR's reader are pickles, which are not supported; data.retriever_results has the same "
    "questions and passages",
    "indexes": _BUILD,
    "checkpoint": _MODELS,
    "original.narrativeqa": "its authors publish a repository, not a file: `git clone` deepmind/narrativeqa, and give "
    "the folder in place of a file of questions",
    "original.2wiki": "its authors publish an archive; use hub.2wiki, or unpack the archive and give its dev.json",
    "pretrained": "pretrained models are on the hub; all commands accept hub names",
}


def find(name: str) -> list[Resource]:
    """The resource ``name``, or else all resources whose names begin with ``name``, as in DPR's downloader.

    Raises:
        InputError: there is no such resource; the message has advice, or the closest name.
    """
    matches = [resource for resource in RESOURCES if resource.name == name]
    matches = matches or [resource for resource in RESOURCES if name and resource.name.startswith(name)]
    if not matches:
        if advice := left_out(name):
            raise InputError(f"{name}: {advice[0]}")
        close = difflib.get_close_matches(name, [resource.name for resource in RESOURCES], 1, 0)
        raise InputError(f"{name}: no such resource; did you mean {close[0]}? `genpoe data list` lists them all")
    return matches


def left_out(name: str) -> list[str]:
    """Advice for the entries of `UNAVAILABLE` whose names begin with ``name``, or the other way round."""
    if not name or any(resource.name == name for resource in RESOURCES):
        return []
    covered = [advice for key, advice in UNAVAILABLE.items() if name.startswith(key) or key.startswith(name)]
    return list(dict.fromkeys(covered))


def fetch(resource: Resource, folder: str | Path, *, progress: bool = False) -> tuple[Path, bool]:
    """Download a resource into ``folder``, unless it exists.

    Returns:
        The path of the file, and whether it was downloaded now.

    Raises:
        InputError: see `download` and `read_hub_questions`.
    """
    path = resource.path(folder)
    if not resource.address.startswith(_HUB):
        return path, download(resource.address, path, progress=progress)
    if path.exists():
        return path, False
    data_set, _, split = resource.address.removeprefix(_HUB).rpartition("/")
    questions = read_hub_questions(data_set, split, need_answers=data_set != SQUAD_2)
    write_questions(path, questions, source=resource.address)
    return path, True
