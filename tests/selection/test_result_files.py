from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import lm_eval.tasks
import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from genpoe_plugin.data.passages import Passage
from genpoe_plugin.data.questions import Question, RetrievedPassage, passages_from_ctxs, read_header, read_questions
from genpoe_plugin.errors import InputError
from genpoe_plugin.selection.pipeline import Pipeline, Selection
from genpoe_plugin.selection.reranking import Reranker
from genpoe_plugin.selection.result_files import make_results, rerank_all, retrieve_all

TASKS = Path(__file__).parents[2] / "tasks"


def question(number: int) -> Question:
    """Three passages; the answer is in the one of rank 1 + number % 4, if there is such a one."""
    texts = [f"text {number * rank % 7} answer{number - number % 4 + rank - 1}" for rank in (1, 2, 3)]
    passages = tuple(
        RetrievedPassage(Passage(f"{number}.{rank}", "", text), 1 / rank, rank) for rank, text in enumerate(texts, 1)
    )
    return Question(f"q{number}", (f"answer{number}",), passages)


QUESTIONS = [question(number) for number in range(40)]


class ByNumber:
    """Stands in for a reranker: the number in the text is the score, so that there are ties; notes the calls."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def score(self, pairs: Sequence[tuple[str, str]], *, progress: bool = False) -> np.ndarray:
        self.calls.append(len(pairs))
        return np.array([float(passage.split()[1]) for _, passage in pairs], np.float32)


def rerank(asked: Iterator[Question]) -> Iterator[Question]:
    return rerank_all(asked, ByNumber())  # type: ignore[arg-type]


def test_reranked_by_score_then_by_the_retrievers_rank() -> None:
    for given, ranked in zip(QUESTIONS, rerank(iter(QUESTIONS)), strict=True):
        expected = sorted(given.passages, key=lambda p: (-float(p.passage.text.split()[1]), p.rank))
        assert [p.passage for p in ranked.passages] == [p.passage for p in expected]
        assert [(p.score, p.rank) for p in ranked.passages] == [(p.score, p.rank) for p in expected]
        assert [p.rerank_rank for p in ranked.passages] == [1, 2, 3]
        assert [p.rerank_score for p in ranked.passages] == [float(p.passage.text.split()[1]) for p in expected]
        assert [p.has_answer for p in ranked.passages] == [given.answers[0] in p.passage.text.split() for p in expected]
    again = list(rerank(rerank(iter(QUESTIONS))))
    assert again == list(rerank(iter(QUESTIONS)))  # as if the first order had never been


def test_questions_come_before_the_last_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("genpoe_plugin.selection.result_files.SCORE_BLOCK", 10)
    drawn = []

    def ask() -> Iterator[Question]:
        for item in QUESTIONS:
            drawn.append(item)
            yield item

    reranker = ByNumber()
    first = next(rerank_all(ask(), reranker))  # type: ignore[arg-type]
    assert first.question == "q0" and len(drawn) == 4 and reranker.calls == [12]


def test_retrieved_block_by_block_and_labelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("genpoe_plugin.selection.result_files.SEARCH_BLOCK", 16)
    by_text = {item.question: item for item in QUESTIONS}
    blocks = []

    class Finds:
        def retrieve(self, questions: Sequence[str], k: int) -> list[tuple[RetrievedPassage, ...]]:
            blocks.append(len(questions))
            return [by_text[text].passages[:k] for text in questions]

    old = RetrievedPassage(Passage("old", "", "answer1"), 9.0, 1)
    asked = [Question(item.question, item.answers, (old,)) for item in QUESTIONS]
    found = list(retrieve_all(asked, Finds(), 2))  # type: ignore[arg-type]
    assert blocks == [16, 16, 8]
    assert [[p.passage.id for p in item.passages] for item in found] == [[f"{n}.1", f"{n}.2"] for n in range(40)]
    assert [[p.has_answer for p in item.passages] for item in found] == [[n % 4 == 0, n % 4 == 1] for n in range(40)]


@pytest.mark.parametrize("form", ["genpoe", "dpr"])
def test_whole_files_and_their_quality(tmp_path: Path, form: str) -> None:
    out = tmp_path / "new" / "out"
    quality = make_results(out, QUESTIONS, rerank, {"reranker": "by number"}, form=form)
    expected = list(rerank(iter(QUESTIONS)))
    assert list(read_questions(out)) == expected
    assert list(out.parent.iterdir()) == [out]
    assert read_header(out) == ({"reranker": "by number"} if form == "genpoe" else {})
    before = [rank if rank < 4 else None for rank in (1, 2, 3, 4)] * 10
    after = [next((p.rerank_rank for p in item.passages if p.has_answer), None) for item in expected]
    places = [[next(iter(np.flatnonzero(r.grades) + 1), None) for r in quality.retrieved]]
    places.append([next(iter(np.flatnonzero(r.grades) + 1), None) for r in quality.reranked])
    assert (*places, quality.passages) == (before, after, 3)
    assert before != after
    lines = quality.table(reranked=True).splitlines()
    assert lines[0].split() == ["40", "questions", "recall@1", "MRR", "nDCG@10"]
    assert [line.split()[0] for line in lines[1:]] == ["retrieved", "reranked"]
    assert len(quality.table(reranked=False).splitlines()) == 2


class Stopped(BaseException):
    """What is not caught on the way, as a kill is not."""


def stops_after(count: int, error: type[BaseException]):
    def work(asked: Iterator[Question]) -> Iterator[Question]:
        for number, item in enumerate(rerank(asked)):
            if number == count:
                raise error
            yield item

    return work


def test_a_killed_run_goes_on_and_does_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_results(tmp_path / "whole.jsonl", QUESTIONS, rerank, {"a": 1})
    monkeypatch.setattr("genpoe_plugin.selection.result_files.SCORE_BLOCK", 1)
    out, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    with pytest.raises(Stopped):
        make_results(out, QUESTIONS, stops_after(7, Stopped), {"a": 1})
    assert not out.exists()
    whole = part.read_bytes()
    for cut in (0, 5, len(whole) - 1, len(whole) - 100, len(whole)):  # a kill in the header, in a line, at its end
        part.write_bytes(whole[:cut])
        kept = max(whole[:cut].count(b"\n") - 1, 0)
        seen = []

        def work(asked: Iterator[Question], seen: list[str] = seen) -> Iterator[Question]:
            for item in rerank(asked):
                seen.append(item.question)
                yield item

        quality = make_results(out, QUESTIONS, work, {"a": 1})
        assert seen == [f"q{number}" for number in range(kept, 40)]
        assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
        assert len(quality.retrieved) == 40 and not part.exists()


class ByBatch(ByNumber):
    """Its scores depend on the other pairs of the call, as the last digits of a real reranker's do."""

    def score(self, pairs: Sequence[tuple[str, str]], *, progress: bool = False) -> np.ndarray:
        return super().score(pairs) + np.float32(sum(len(passage) for _, passage in pairs) / 1000)


@pytest.mark.parametrize("block", [1, 10, 30, 10_000])
def test_a_resumed_run_scores_the_same_pairs_together(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("genpoe_plugin.selection.result_files.SCORE_BLOCK", block)

    def work(asked: Iterator[Question]) -> Iterator[Question]:
        return rerank_all(asked, ByBatch())  # type: ignore[arg-type]

    out, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)  # keep the part
    make_results(out, QUESTIONS, work, {"a": 1}, reranks=True)
    monkeypatch.undo()
    monkeypatch.setattr("genpoe_plugin.selection.result_files.SCORE_BLOCK", block)
    wanted, lines = out.read_bytes(), part.read_bytes().splitlines(keepends=True)
    assert len(lines) == 41
    for kept in (0, 1, 2, 5, 15, 39, 40, 41):
        part.write_bytes(b"".join(lines[:kept]) + b'{"questi')
        make_results(out, QUESTIONS, work, {"a": 1}, reranks=True)
        assert out.read_bytes() == wanted


def test_an_interrupt_says_what_is_kept(tmp_path: Path) -> None:
    with pytest.raises(
        KeyboardInterrupt, match=r"3 questions are saved in .*out\.json\.part; rerun the same command to resume"
    ):
        make_results(tmp_path / "out.json", QUESTIONS, stops_after(3, KeyboardInterrupt), {}, form="dpr")
    assert [path.name for path in tmp_path.iterdir()] == ["out.json.part"]
    assert len(list(read_questions(tmp_path / "out.json.part"))) == 3


def test_what_another_run_began_is_not_gone_on_from(tmp_path: Path) -> None:
    out, part = tmp_path / "out", tmp_path / "out.part"
    with pytest.raises(Stopped):
        make_results(out, QUESTIONS, stops_after(3, Stopped), {"reranker": "a", "k": 2})
    begun = part.read_bytes()
    for header, questions, message in [
        ({"reranker": "b", "k": 2}, QUESTIONS, "out.part: started with reranker 'a', not 'b'; delete it"),
        ({"reranker": "a"}, QUESTIONS, "out.part: started with something else; delete it"),
        ({"reranker": "a", "k": 2}, QUESTIONS[1:], "out.part: question 1 differs from the input"),
        ({"reranker": "a", "k": 2}, QUESTIONS[:2], "out.part: question 3 differs from the input"),
    ]:
        with pytest.raises(InputError) as caught:
            make_results(out, questions, rerank, header)
        assert message in str(caught.value) and part.read_bytes() == begun and not out.exists()


def test_a_full_disk_is_one_line_and_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.FileIO):
        room = 2000

        def write(self, data, /) -> int:
            taken = super().write(bytes(data)[: Full.room])
            Full.room -= taken
            if taken == 0:
                raise OSError(28, "No space left on device")
            return taken

    real = Path.open
    monkeypatch.setattr(
        Path, "open", lambda self, mode="r", **options: Full(self, "a") if mode == "ab" else real(self, mode, **options)
    )
    with pytest.raises(InputError, match=r"out\.part: cannot be written \(No space left on device\)") as caught:
        make_results(tmp_path / "out", QUESTIONS, rerank, {})
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    Full.room = 10**9
    make_results(tmp_path / "out", QUESTIONS, rerank, {})
    assert list(read_questions(tmp_path / "out")) == list(rerank(iter(QUESTIONS)))


def test_a_directory_in_the_place_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a directory; give the name of a file"):
        make_results(tmp_path, QUESTIONS, rerank, {})


def selections(path: Path, tokenizer: PreTrainedTokenizerFast, **options) -> list[Selection]:
    """What the model class makes of the docs that lm-eval loads from a file."""
    manager = lm_eval.tasks.TaskManager(
        include_path=str(TASKS), include_defaults=False, metadata={"genpoe_data": str(path)}
    )
    docs = list(manager.load(["genpoe_nq"])["tasks"]["genpoe_nq"].test_docs())
    asked = [Question(doc["question"], tuple(doc["answers"]), passages_from_ctxs(doc["ctxs"], "doc")) for doc in docs]
    return Pipeline(tokenizer, num_passages=2, progress=False, **options).select(["genpoe_nq"] * len(asked), asked)


@pytest.mark.parametrize("reranked", [False, True])
def test_both_formats_give_the_tasks_the_same_passages_and_gates(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, reranked: bool
) -> None:
    work = rerank if reranked else lambda asked: asked
    for form in ("genpoe", "dpr"):
        make_results(tmp_path / form, QUESTIONS, work, {}, form=form)
    ours, theirs = (selections(tmp_path / form, tokenizer) for form in ("genpoe", "dpr"))
    assert ours == theirs
    # Frozen passages are those of a run that reranks by itself.
    reranker = ByNumber() if reranked else None
    make_results(tmp_path / "before", QUESTIONS, lambda asked: asked, {})
    live = selections(tmp_path / "before", tokenizer, reranker=reranker)
    assert [(item.strings, item.gates) for item in live] == [(item.strings, item.gates) for item in ours]
    assert len({item.gates for item in ours}) > 1 if reranked else {item.gates for item in ours} == {(0.5, 0.5)}


def test_a_real_reranker(tmp_path: Path, llm_dir: Path) -> None:
    reranker = Reranker.load(llm_dir, format="bge")
    make_results(tmp_path / "out.json", QUESTIONS[:3], lambda asked: rerank_all(asked, reranker), {}, form="dpr")
    for item in json.loads((tmp_path / "out.json").read_text()):
        scores = [reranker.score([(item["question"], ctx["text"])])[0] for ctx in item["ctxs"]]
        assert [ctx["rerank_score"] for ctx in item["ctxs"]] == pytest.approx(scores, abs=1e-4)
        assert scores == sorted(scores, reverse=True)


def test_passages_cut_by_an_llm_get_the_scores_of_its_evaluations(tokenizer: PreTrainedTokenizerFast) -> None:
    class ByLength:
        def score(self, pairs: Sequence[tuple[str, str]], *, progress: bool = False) -> np.ndarray:
            return np.array([len(passage) for _, passage in pairs], np.float32)

    texts = ("word " * 900, "much longer words " * 300, "short")
    passages = tuple(RetrievedPassage(Passage(str(rank), "", text), 1.0, rank) for rank, text in enumerate(texts, 1))
    asked, reranker = [Question("q", ("short",), passages)], ByLength()
    pipeline = Pipeline(tokenizer, reranker=reranker, progress=False)  # type: ignore[arg-type]
    (evaluated,) = pipeline.select(["t"], asked)
    (whole,) = rerank_all(asked, reranker)  # type: ignore[arg-type]
    (cut,) = rerank_all(asked, reranker, tokenizer)  # type: ignore[arg-type]
    assert cut.passages == evaluated.retrieved != whole.passages
