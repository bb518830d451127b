"""Records of data sets that are not in DPR's form, brought to it: ``question``, ``answers`` and ``ctxs``.

A record is as the authors' file or the Hugging Face hub has it (both forms are known where they differ). Passages that
come with a question are its ``ctxs``; ``has_answer`` marks those that the data names as the ones to answer from, which
in multi-hop data need not contain the answer itself. Their ids are made of what they say, so that one passage has one
id in all questions and none stands for two.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from genpoe_plugin.data.passages import content_id
from genpoe_plugin.errors import InputError

Record = Mapping[str, Any]

WORDS = 100  # of a passage that is part of a longer text, as DPR cuts Wikipedia's articles


def to_dpr(record: Record, where: str) -> Iterator[Record]:
    """The questions of one record; the record itself where it is of none of the data sets known here.

    Each has ``question``, ``answers`` and ``ctxs``, and ``case`` where several are wordings of one. What is in the
    fields is not checked here.

    Raises:
        InputError: the record begins like one of a data set's and goes on otherwise; ``where`` begins the message.
    """
    form = next((form for form in _FORMS if "ctxs" not in record and form.fits(record)), None)
    if form is None:
        yield record
        return
    try:
        yield from form.read(record)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{where}: not what a record of {form.name} has ({reason})") from error


class _Form(NamedTuple):
    name: str
    fits: Callable[[Record], bool]
    read: Callable[[Record], Iterable[Record]]


def _squad_article(record: Record) -> Iterator[Record]:
    """The authors' file: an article with its paragraphs, each with its questions."""
    for paragraph in record["paragraphs"]:
        for qa in paragraph["qas"]:
            answers = [answer["text"] for answer in qa["answers"]]
            yield _squad(qa["question"], answers, record["title"], paragraph["context"])


def _squad_row(record: Record) -> Iterator[Record]:
    yield _squad(record["question"], record["answers"]["text"], record["title"], record["context"])


def _squad(question: str, answers: Iterable[str], title: str, context: str) -> Record:
    # Titles are those of Wikipedia's addresses.
    return _question(question, answers, [_passage(title.replace("_", " "), context)])


def _multi_hop(record: Record) -> Iterator[Record]:
    """HotpotQA and 2WikiMultihopQA: ten paragraphs, of which the supporting facts name some."""
    supporting = {title for title, _ in _pairs(record["supporting_facts"], "title", "sent_id")}
    passages = [
        _passage(title, " ".join(sentence.strip() for sentence in sentences), title in supporting)
        for title, sentences in _pairs(record["context"], "title", "sentences")
        if any(sentence.strip() for sentence in sentences)
    ]
    yield _question(record["question"], [record["answer"]], passages)


def _pairs(value: Any, first: str, second: str) -> list[tuple[Any, Any]]:
    """Pairs, which the hub has as two lists of equal length."""
    if isinstance(value, Mapping):
        return list(zip(value[first], value[second], strict=True))
    return [(left, right) for left, right in value]


def _narrativeqa(record: Record) -> Iterator[Record]:
    """The summary of the story, cut into passages: whole, it is longer than a passage can be."""
    summary = record["document"]["summary"]
    words = summary["text"].split()
    passages = [
        _passage(summary.get("title") or "", " ".join(words[at : at + WORDS])) for at in range(0, len(words), WORDS)
    ]
    yield _question(record["question"]["text"], [answer["text"] for answer in record["answers"]], passages)


def _mquake(record: Record) -> Iterator[Record]:
    """Each wording of a case is a question; the edited facts are the passages, and the answer is what follows."""
    passages = []
    for edit in record["requested_rewrite"]:
        # MQuAKE-Remastered has the fields of the target side by side.
        target = edit["target_new_str"] if "target_new_str" in edit else edit["target_new"]["str"]
        fact = f"{edit['prompt'].replace('{}', edit['subject'])} {target}"
        passages.append(_passage("", fact.rstrip(".") + "."))
    answers = [record["new_answer"], *(record.get("new_answer_alias") or ())]
    for question in record["questions"]:
        yield {**_question(question, answers, passages), "case": str(record["case_id"])}


def _popqa(record: Record) -> Iterator[Record]:
    answers = record["possible_answers"]
    yield _question(record["question"], json.loads(answers) if isinstance(answers, str) else answers)


def _triviaqa(record: Record) -> Iterator[Record]:
    """An answer is the value or any of its aliases."""
    answer = record["answer"]
    yield _question(record["question"], [answer["value"], *answer["aliases"]])


_FORMS = (
    _Form("SQuAD's file", lambda record: "paragraphs" in record and "question" not in record, _squad_article),
    _Form("SQuAD", lambda record: "context" in record and isinstance(record.get("answers"), Mapping), _squad_row),
    _Form("HotpotQA or 2WikiMultihopQA", lambda record: {"context", "supporting_facts"} <= record.keys(), _multi_hop),
    _Form("NarrativeQA", lambda record: isinstance(record.get("question"), Mapping), _narrativeqa),
    _Form("MQuAKE", lambda record: "requested_rewrite" in record, _mquake),
    _Form("PopQA", lambda record: "possible_answers" in record and "answers" not in record, _popqa),
    _Form("TriviaQA", lambda record: isinstance(record.get("answer"), Mapping), _triviaqa),
)


def _question(question: str, answers: Iterable[str], ctxs: list[Record] | None = None) -> Record:
    return {"question": question, "answers": list(dict.fromkeys(answers)), "ctxs": ctxs or []}


def _passage(title: str, text: str, gold: bool = True) -> Record:
    return {"id": content_id(title, text), "title": title, "text": text, "has_answer": gold}
