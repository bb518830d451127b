"""Convert records of other data sets to DPR's form: ``question``, ``answers`` and ``ctxs``.

A record is a part of the authors' file or a row of the Hugging Face hub; both forms are supported where they differ.
The passages of a question become its ``ctxs``. ``has_answer`` marks those that the data set names as evidence; in
multi-hop data, they need not contain the answer. Ids are computed from the content, so a passage has the same id in all
questions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from genpoe_plugin.data.passages import content_id
from genpoe_plugin.errors import InputError
from genpoe_plugin.json_text import parse_json

Record = Mapping[str, Any]

WORDS = 100  # words per passage of a longer text, as in DPR's passages of Wikipedia


def to_dpr(record: Record, where: str) -> Iterator[Record]:
    """Convert one record to questions; a record of an unknown data set is returned unchanged.

    Each question has ``question``, ``answers`` and ``ctxs``, ``case`` if several questions are wordings of one, maybe
    ``id``, and ``original_answers`` if the passages were changed to state others. The values are not checked here.

    Args:
        record: the record.
        where: location of the record, for error messages.

    Raises:
        InputError: the record looks like one of a known data set, but lacks some of its fields.
    """
    form = next((form for form in _FORMS if "ctxs" not in record and form.fits(record)), None)
    if form is None:
        yield record
        return
    try:
        yield from form.read(record)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{where}: not a valid record of {form.name} ({reason})") from error


class _Form(NamedTuple):
    """The form of a data set's records: how to recognise and how to convert them."""

    name: str
    fits: Callable[[Record], bool]
    read: Callable[[Record], Iterable[Record]]


def _squad_article(record: Record) -> Iterator[Record]:
    """An article of the authors' file: paragraphs, each with its questions."""
    for paragraph in record["paragraphs"]:
        for qa in paragraph["qas"]:
            answers = [answer["text"] for answer in qa["answers"]]
            yield _squad(qa["question"], answers, record["title"], paragraph["context"])


def _squad_row(record: Record) -> Iterator[Record]:
    yield _squad(record["question"], record["answers"]["text"], record["title"], record["context"])


def _squad(question: str, answers: list[str], title: str, context: str) -> Record:
    # Titles are in the form of Wikipedia's URLs. The passage of a question without answers (SQuAD 2.0) supports none.
    return _question(question, answers, [_passage(title.replace("_", " "), context, gold=bool(answers))])


def _multi_hop(record: Record) -> Iterator[Record]:
    """A record of HotpotQA or 2WikiMultihopQA: ten paragraphs, some of which are named as supporting facts."""
    supporting = {title for title, _ in _pairs(record["supporting_facts"], "title", "sent_id")}
    passages = [
        _passage(title, " ".join(sentence.strip() for sentence in sentences), title in supporting)
        for title, sentences in _pairs(record["context"], "title", "sentences")
        if any(sentence.strip() for sentence in sentences)
    ]
    yield _question(record["question"], [record["answer"]], passages)


def _pairs(value: Any, first: str, second: str) -> list[tuple[Any, Any]]:
    """A list of pairs; the hub stores them as two lists of equal length."""
    if isinstance(value, Mapping):
        return list(zip(value[first], value[second], strict=True))
    return [(left, right) for left, right in value]


def _narrativeqa(record: Record) -> Iterator[Record]:
    """A record of NarrativeQA; the story's summary is cut into passages, because it is longer than a passage may be."""
    summary = record["document"]["summary"]
    words = summary["text"].split()
    passages = [
        _passage(summary.get("title") or "", " ".join(words[at : at + WORDS])) for at in range(0, len(words), WORDS)
    ]
    yield _question(record["question"]["text"], [answer["text"] for answer in record["answers"]], passages)


def _mquake(record: Record) -> Iterator[Record]:
    """A case of MQuAKE: each wording is a question with the edited facts as passages and the new answer."""
    passages = []
    for edit in record["requested_rewrite"]:
        # MQuAKE-Remastered has "target_new_str" instead of a nested "target_new".
        target = edit["target_new_str"] if "target_new_str" in edit else edit["target_new"]["str"]
        fact = f"{edit['prompt'].replace('{}', edit['subject'])} {target}"
        passages.append(_passage("", fact.rstrip(".") + "."))
    answers = [record["new_answer"], *(record.get("new_answer_alias") or ())]
    for question in record["questions"]:
        yield {**_question(question, answers, passages), "case": str(record["case_id"])}


def _popqa(record: Record) -> Iterator[Record]:
    answers = record["possible_answers"]
    yield _question(record["question"], parse_json(answers) if isinstance(answers, str) else answers)


def _nq_swap(record: Record) -> Iterator[Record]:
    question = _question(record["question"], record["sub_answer"], [_passage("", record["sub_context"])])
    yield {**question, "original_answers": list(record["org_answer"])}


def _triviaqa(record: Record) -> Iterator[Record]:
    """A record of TriviaQA; the accepted answers are the value and its aliases."""
    answer = record["answer"]
    yield _question(record["question"], [answer["value"], *answer["aliases"]])


def _is_beir(record: Record) -> bool:
    # A passage of BEIR has a title, which may be empty.
    return {"_id", "text"} <= record.keys() and not {"question", "title"} & record.keys()


def _beir(record: Record) -> Iterator[Record]:
    """A query of BEIR, whose relevant passages are in other files."""
    yield {**_question(record["text"], []), "id": record["_id"]}


_FORMS = (
    _Form("BEIR's queries", _is_beir, _beir),
    _Form("SQuAD's file", lambda record: "paragraphs" in record and "question" not in record, _squad_article),
    _Form("SQuAD", lambda record: "context" in record and isinstance(record.get("answers"), Mapping), _squad_row),
    _Form("HotpotQA or 2WikiMultihopQA", lambda record: {"context", "supporting_facts"} <= record.keys(), _multi_hop),
    _Form("NarrativeQA", lambda record: isinstance(record.get("question"), Mapping), _narrativeqa),
    _Form("MQuAKE", lambda record: "requested_rewrite" in record, _mquake),
    _Form("PopQA", lambda record: "possible_answers" in record and "answers" not in record, _popqa),
    _Form("NQ-Swap", lambda record: "sub_context" in record, _nq_swap),
    _Form("TriviaQA", lambda record: isinstance(record.get("answer"), Mapping), _triviaqa),
)


def _question(question: str, answers: Iterable[str], ctxs: list[Record] | None = None) -> Record:
    return {"question": question, "answers": list(dict.fromkeys(answers)), "ctxs": ctxs or []}


def _passage(title: str, text: str, gold: bool = True) -> Record:
    return {"id": content_id(title, text), "title": title, "text": text, "has_answer": gold}
