"""The data that can be downloaded, under the names that DPR's own downloader gives it."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from genpoe_plugin.download import download
from genpoe_plugin.errors import InputError
from genpoe_plugin.hub_questions import NQ_OPEN, TRIVIA_QA, read_hub_questions
from genpoe_plugin.questions import write_questions

_DPR = "https://dl.fbaipublicfiles.com/dpr/"
_HUB = "hub:"
_TRIVIA = "see nlp.cs.washington.edu/triviaqa"
_LICENCES = {
    "Wikipedia": "CC BY-SA",
    "NQ": "CC BY-SA 3.0",
    "NQ-open": "CC BY-SA 3.0",
    "TriviaQA": _TRIVIA,
    "TriviaQA unfiltered": _TRIVIA,
    "SQuAD v1.1": "CC BY-SA 4.0",
    "WebQuestions": "see nlp.stanford.edu/software/sempre",
    "CuratedTREC": "see trec.nist.gov/data/qa.html",
}


@dataclass(frozen=True, slots=True)
class Resource:
    """A file that can be downloaded.

    ``address`` is an URL, or ``hub:DATASET/SPLIT``; ``kind`` is what the file holds, and so what reads it: "passages"
    (`read_passages`), "questions" or "questions with passages" (`read_questions`).
    """

    name: str
    address: str
    kind: str
    what: str
    licence: str

    def path(self, folder: str | Path) -> Path:
        """Where it is kept in ``folder``: a level for each part of the name, as DPR has it; ``.gz`` stays ``.gz``."""
        parent, _, file = self.name.replace(".", "/").rpartition("/")
        suffixes = ".jsonl" if self.address.startswith(_HUB) else _suffixes(self.address)
        return Path(folder) / parent / f"{file}{suffixes}"


def _suffixes(url: str) -> str:
    """``.tsv.gz`` and the like, without what else DPR's file names have dots for, such as ``nq-dev.qa.csv``."""
    return "".join(suffix for suffix in Path(url).suffixes if suffix != ".qa")


# Kind, what all of a group are; name after "data.", address after _DPR, data set and part.
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
        "positives, and negatives that BM25 finds",
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
        "positives, and negatives that DPR finds",
        (("retriever.nq-adv-hn-train", "data/retriever/biencoder-nq-adv-hn-train.json.gz", "NQ, train"),),
    ),
)
_HUB_SPLITS = (
    ("hub.nq_open.train", f"{NQ_OPEN}/train", "NQ-open, train"),
    ("hub.nq_open.validation", f"{NQ_OPEN}/validation", "NQ-open, validation; what genpoe_nq asks"),
    ("hub.trivia_qa.train", f"{TRIVIA_QA}/train", "TriviaQA unfiltered, train"),
    ("hub.trivia_qa.validation", f"{TRIVIA_QA}/validation", "TriviaQA unfiltered, validation; what genpoe_tqa asks"),
)


def _resource(name: str, address: str, kind: str, what: str) -> Resource:
    return Resource(name, address, kind, what, licence=_LICENCES[what.split(",")[0]])


RESOURCES = (
    *(
        _resource(f"data.{name}", f"{_DPR}{address}", kind, f"{part}; {note}" if note else part)
        for kind, note, files in _DPR_FILES
        for name, address, part in files
    ),
    *(_resource(name, f"{_HUB}{address}", "questions", what) for name, address, what in _HUB_SPLITS),
)

_BUILD = "DPR's embeddings and indexes are pickles, which are not read here; `genpoe index build` makes an index"
_MODELS = (
    "DPR's checkpoints are pickles, which are not read here; its encoders are on the hub: `genpoe index build "
    "--encoder facebook/dpr-question_encoder-single-nq-base,facebook/dpr-ctx_encoder-single-nq-base`"
)

# What DPR's downloader has under these names, or could be thought to have, and what to do instead.
UNAVAILABLE: dict[str, str] = {
    "data.retriever_results.trivia": "DPR publishes no results for TriviaQA; `genpoe retrieve` makes them of the "
    "questions, data.retriever.qas.trivia-train and so on",
    "data.retriever_results.nq.single.wikipedia_passages": _BUILD,
    "data.retriever_results.nq.single-adv-hn.wikipedia_passages": _BUILD,
    "data.reader": "the data of DPR's reader are pickles, which are not read here; data.retriever_results has the same "
    "questions and passages",
    "indexes": _BUILD,
    "checkpoint": _MODELS,
    "pretrained": "pretrained models are on the hub, and any command here takes its names",
}


def find(name: str) -> list[Resource]:
    """The resource called ``name``, or else all whose names begin so, as DPR's downloader does it.

    Raises:
        InputError: there is none; the message says what to do instead, or what was meant.
    """
    found = [resource for resource in RESOURCES if resource.name == name]
    found = found or [resource for resource in RESOURCES if name and resource.name.startswith(name)]
    if not found:
        if advice := left_out(name):
            raise InputError(f"{name}: {advice[0]}")
        close = difflib.get_close_matches(name, [resource.name for resource in RESOURCES], 1, 0)
        raise InputError(f"{name}: no such resource; did you mean {close[0]}? `genpoe data list` has them all")
    return found


def left_out(name: str) -> list[str]:
    """What to do instead, for all that `UNAVAILABLE` has under ``name``, as a whole or in part."""
    if not name or any(resource.name == name for resource in RESOURCES):
        return []
    covered = [advice for key, advice in UNAVAILABLE.items() if name.startswith(key) or key.startswith(name)]
    return list(dict.fromkeys(covered))


def fetch(resource: Resource, folder: str | Path, *, progress: bool = False) -> tuple[Path, bool]:
    """Download a resource into ``folder``, unless it is there.

    Returns:
        Where it is, and whether it had to be downloaded.

    Raises:
        InputError: as `download` and `read_hub_questions`.
    """
    path = resource.path(folder)
    if not resource.address.startswith(_HUB):
        return path, download(resource.address, path, progress=progress)
    if path.exists():
        return path, False
    data_set, _, split = resource.address.removeprefix(_HUB).rpartition("/")
    write_questions(path, read_hub_questions(data_set, split), source=resource.address)
    return path, True
