"""Judging of saved answers: what is asked once, what is saved, what is reported."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from markupsafe import escape
from sklearn.metrics import cohen_kappa_score

from benchmarks.synthetic_results import documents, write_run
from genpoe_plugin.comparison import judging
from genpoe_plugin.comparison.judging import METRIC, Judging, agreement, read_prompt
from genpoe_plugin.comparison.latex import latex
from genpoe_plugin.comparison.leaderboard import Comparison, compare
from genpoe_plugin.comparison.page import page
from genpoe_plugin.errors import InputError
from genpoe_plugin.files import only_writer

N = 20
DOCS = documents(N, passages=2)


class Even:
    """Stands in for an LLM: answers with an even number are right. It stops after ``most`` prompts."""

    def __init__(self, name: str = "even", most: int | None = None) -> None:
        self.name, self.most = name, most
        self.prompts: list[str] = []

    def log_likelihoods(self, prompts: Sequence[str], continuations: Sequence[str]) -> list[list[float]]:
        assert tuple(continuations) == (" yes", " no")
        if self.most is not None and len(self.prompts) + len(prompts) > self.most:
            raise KeyboardInterrupt
        self.prompts += prompts
        numbers = [int(prompt.partition("Answer: response ")[2].split()[0]) for prompt in prompts]
        return [[-1.0, -2.0] if number % 2 == 0 else [-2.0, -1.0] for number in numbers]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    for name, right in (("a", 5), ("b", 10)):
        em = {"em": [float(number < right) for number in range(N)]}
        write_run(tmp_path / "results" / name, em, docs=DOCS, model_args={"pretrained": name})
    return tmp_path / "results"


def compared(results: Path, judge: Even, prompt: str | None = None) -> Comparison:
    made = Judging(judge, prompt or read_prompt(), results / "judgements.jsonl")
    return compare([results], draws=20, judging=made)


def test_a_metric_of_its_own_with_its_judge_and_agreement(results: Path) -> None:
    judge = Even()
    comparison = compared(results, judge)
    (board,) = comparison.boards
    assert board.metrics == ("em", METRIC)
    for system in board.systems:
        assert system.estimates[METRIC].mean == 0.5
        np.testing.assert_array_equal(system.scores[METRIC], [number % 2 == 0 for number in range(N)])
    assert {system.estimates["em"].mean for system in board.systems} == {0.25, 0.5}
    em = [number < right for right in (5, 10) for number in range(N)]
    same = np.mean([one == (number % 2 == 0) for one, number in zip(em, [*range(N)] * 2, strict=True)])
    kappa = cohen_kappa_score(em, [number % 2 == 0 for number in range(N)] * 2)
    (note,) = comparison.notes
    assert note.startswith("task t: judged is by even with prompt ")
    assert f"% {note}\n" in latex(comparison) and str(escape(note)) in page(comparison)
    assert note.endswith(f"{100 * same:.1f} % of 40 answers (Cohen's kappa {kappa:.2f})")
    # Both runs have the same answers, so each is judged once.
    assert len(judge.prompts) == N
    assert f"Question: {DOCS[3]['question']}\nAccepted answers: {'; '.join(DOCS[3]['answers'])}\n" in judge.prompts[3]
    assert judge.prompts[3].endswith("Right (yes or no):")
    assert not compare([results], draws=20).notes  # no trace of it without --judge


def test_an_interrupted_run_goes_on(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "BLOCK", 3)
    with pytest.raises(KeyboardInterrupt):
        compared(results, Even(most=10))
    file = results / "judgements.jsonl"
    assert len(file.read_text().splitlines()) == 9
    with file.open("a") as broken:
        broken.write('{"judge": "even", "pro')  # a killed process
    judge = Even()
    interrupted = compared(results, judge)
    assert len(judge.prompts) == N - 9
    lines = file.read_text().splitlines()
    assert len(lines) == N and all({*json.loads(line)} == {"judge", "prompt", "item", "yes", "no"} for line in lines)
    file.unlink()
    whole = compared(results, Even())
    assert [s.scores[METRIC].tolist() for s in interrupted.boards[0].systems] == [
        s.scores[METRIC].tolist() for s in whole.boards[0].systems
    ]
    assert sorted(lines) == sorted(file.read_text().splitlines())


def test_two_processes_do_not_judge_into_one_file(results: Path) -> None:
    with only_writer(results / "judgements.jsonl"), pytest.raises(InputError, match="another process writes it"):
        compared(results, Even())
    compared(results, Even())
    with only_writer(results / "judgements.jsonl"):  # nothing to write
        compared(results, Even(most=0))


def test_other_judges_and_prompts_judge_again(results: Path) -> None:
    compared(results, Even())
    for judge, prompt in (
        (Even("another"), None),
        (Even(), "{question} {accepted} Answer: {answer} ?"),
    ):
        compared(results, judge, prompt)
        assert len(judge.prompts) == N
    again = Even()
    compared(results, again)
    assert not again.prompts


def test_braces_in_a_question_are_text(results: Path) -> None:
    item = judging._Item("what is {answer}?", ("{question}",), "3 {accepted}")
    assert judging._fill("{question}|{accepted}|{answer}", item) == "what is {answer}?|{question}|3 {accepted}"


def test_errors_are_one_line(results: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("{question} {answer}")
    with pytest.raises(InputError, match=r"\{accepted\} is missing$"):
        read_prompt(tmp_path / "prompt.txt")
    (results / "judgements.jsonl").write_text('{"judge": 1}\n')
    with pytest.raises(InputError, match=r"judgements\.jsonl:1: not a judgement; delete the file"):
        compared(results, Even())


def test_kappa_equals_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    for share in (0.1, 0.5, 0.9):
        one, other = rng.random(200) < share, rng.random(200) < 0.4
        assert agreement(one, other)[1] == pytest.approx(cohen_kappa_score(one, other))
    assert agreement(np.ones(5, bool), np.ones(5, bool)) == (1.0, 0.0)
