"""The benchmark of forms: its conditions, its split, its runs and its table."""

from __future__ import annotations

import json

import pytest

from benchmarks import forms
from benchmarks.forms import FORMS, Run, World, conditions, markdown, questions_of, rows, split, train_and_evaluate
from genpoe_plugin.data.answers import has_answer

TINY = World(entities=30, tested=4, rate_steps=2, steps=4, batch_size=4, every=2)


@pytest.mark.parametrize("world", forms.WORLDS)
def test_only_two_conditions_have_the_answer(world):
    for name, questions in conditions(questions_of(world, "test", 12, 0), 0).items():
        stated = [any(has_answer(item.passage.text, q.answers) for item in q.passages) for q in questions]
        assert all(stated) if name in ("single", "four") else not any(stated)
        assert {len(question.passages) for question in questions} == {4 if name == "four" else 1}


@pytest.mark.parametrize("world", forms.WORLDS)
def test_held_out_entities_are_not_in_the_training_questions(world):
    train, held_out = split(questions_of(world, "train", 50, 0))
    titles = [{question.passages[0].passage.title for question in part} for part in (train, held_out)]
    assert all(titles) and not titles[0] & titles[1]


def test_the_papers_form_has_the_papers_options():
    config = FORMS["paper"].config()
    assert (config.head, config.encoder, config.states, config.normalise) == ("dense", "mean", "embeddings", False)
    assert (config.base, config.generator_gain, config.rank) == ("random", 1.0, 16)
    assert not FORMS["paper"].titles and not FORMS["paper"].training
    assert all(FORMS[name].preset == "paper" for name in FORMS if name.startswith("+"))


@pytest.mark.parametrize("form", ["paper", "+ distillation", "memory"])
def test_a_finished_run_is_not_repeated(form, tmp_path, monkeypatch):
    monkeypatch.setattr(forms, "WORLDS", {"relations": TINY})
    run = Run("relations", form, 1e-3, 0)
    found = train_and_evaluate(run, tmp_path)
    assert [row["step"] for row in found["curve"]] == [0, 2, 4]
    assert found["curve"][0]["seconds"] == 0 < found["curve"][1]["seconds"] < found["curve"][2]["seconds"]
    assert found["single"]["em"] == found["curve"][-1]["em"] and {
        "four",
        "gated",
        "diluted",
        "shuffled",
        "random",
    } <= set(found)
    monkeypatch.setattr(forms, "train_hypernetwork", None)
    assert train_and_evaluate(run, tmp_path) == found
    (run.directory(tmp_path) / "scores.json").write_text(json.dumps({"curve": []}))
    assert train_and_evaluate(run, tmp_path) == {"curve": []}


def scored(em: float, four: float, at: int | None) -> dict:
    curve = [{"step": 50, "em": 0.9 if at == 50 else 0.1, "seconds": 7.0}, {"step": 100, "em": em, "seconds": 12.0}]
    score = {"em": em, "f1": em + 0.1}
    return {
        "curve": curve,
        "single": score,
        "four": {"em": four, "f1": four},
        **dict.fromkeys(("gated", "diluted", "shuffled", "random"), score),
    }


def test_rows_and_table_cover_all_seeds():
    scores = {
        ("demo", "paper"): [scored(0.2, 0.1, None), scored(0.4, 0.3, None)],
        ("demo", "memory"): [scored(1.0, 0.9, 50), scored(0.8, 0.8, 100)],
    }
    found = {row.name: row for row in rows(scores)}
    assert found["forms.demo_single_ahead_of_paper"].value == pytest.approx(60)
    assert found["forms.demo_four_over_single"].value == pytest.approx(0.85 / 0.9)
    assert found["forms.demo_four_over_single"].holds is False
    table = markdown(scores, {key: 2e-3 for key in scores})
    assert "| memory | 0.002 | 90.0 (80.0 to 100.0) |" in table
    assert "50 steps, 7 s; 100 steps, 12 s |" in table and "not reached; not reached |" in table
