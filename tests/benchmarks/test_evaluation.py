"""The evaluation benchmark: its baseline gives our answers, and its rows are the measured times."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks import evaluation, random_llm
from benchmarks.cost_model import CostModel, Point, draw

TINY = evaluation.Sizes(64, 3, 8, 6, 2, 1, (1, 2), (1, 2), (5, 10), 1)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(random_llm, "WORDS", 500)
        return evaluation.Models(tmp_path_factory.mktemp("models"), TINY)


@pytest.fixture
def docs(monkeypatch):
    monkeypatch.setattr(random_llm, "WORDS", 500)
    return evaluation.questions(TINY.questions, words=12)


def test_the_naive_flow_has_our_answers(models, docs):
    evaluation.check_answers(models, docs)


def test_different_answers_of_the_naive_flow_are_an_error(models, docs, monkeypatch):
    monkeypatch.setattr(evaluation.NaiveFlow, "answer_all", lambda self, docs: ["w1 " * 10] * len(docs))
    with pytest.raises(RuntimeError, match="batch 1: 6 of 6 answers"):
        evaluation.check_answers(models, docs)


def test_experts_that_change_nothing_are_an_error(models, docs, monkeypatch):
    monkeypatch.setattr(evaluation.Models, "ours", lambda self, form, batch: self.plain(batch))
    plain = evaluation.answers(models.plain(1), evaluation.requests(docs))
    monkeypatch.setattr(evaluation.NaiveFlow, "answer_all", lambda self, docs: plain)
    with pytest.raises(RuntimeError, match="same as with experts"):
        evaluation.check_answers(models, docs)


def test_every_variant_is_timed_in_every_round(models, docs, monkeypatch):
    monkeypatch.setattr(evaluation, "PRODUCT", 64)
    monkeypatch.setattr(evaluation, "reading", lambda: (lambda: torch.ones(8) @ torch.ones(8), 64))
    times = evaluation.time_variants(models, docs, single=2, rounds=2)
    assert all(len(taken) == 2 and min(taken) > 0 for taken in times.values())
    rows = {row.name: row for row in evaluation.ratio_rows(times)}
    assert {name: row.target for name, row in rows.items() if row.target} == {
        "evaluation.naive_speedup": ">= 5",
        "evaluation.naive_speedup_over_hflm_batching": ">= 0.9",
        "evaluation.closed_book_time_ratio_cached": "<= 1.15",
        "evaluation.closed_book_time_ratio_cold": "<= 1.5",
        "evaluation.rag_speedup": ">= 3",
        "evaluation.attention_closed_book_time_ratio_cached": "<= 1.25",
        "evaluation.attention_closed_book_time_ratio_cold": "<= 2",
        "evaluation.attention_rag_speedup_cached": ">= 3",
        "evaluation.attention_first_token_ratio": "<= 1.3",
    }
    floors = evaluation.Floors.at_rates_of(times, models)
    head = models.model.get_output_embeddings().weight
    assert floors.body == sum(weight.numel() for weight in models.model.model.layers.parameters()) + 64
    assert floors.head == head.numel() == 508 * 64


def test_a_ratio_is_the_median_of_the_ratios_per_round():
    times = {"slow": [6.0, 10.0, 8.0], "fast": [1.0, 5.0, 2.0]}
    assert evaluation.ratio(times, "slow", "fast") == 4


def test_a_floor_is_the_larger_of_arithmetic_and_reading():
    floors = evaluation.Floors(
        flops_rate=100, bytes_rate=10, body=30, head=20, expert=5, unit=8, reading=0.5, generator=40
    )
    # 2 rows of 3 tokens through 30 + 4 * 5 numbers, and 2 positions through 20; 30 + 20 + 2 * 4 * 5 numbers to read.
    assert floors.one_pass(2, 3, 4) == max(2 * (6 * 50 + 2 * 20) / 100, 4 * 90 / 10)
    assert floors.one_pass(1000, 1000, 0) == 2 * 1000 * (1000 * 30 + 20) / 100
    assert floors.attending(2, 3, 6) == floors.answering(2, 3) + 10 * max(4 * 2 * 6 * 8 / 10, 2 * 2 * 6 * 8 / 100)
    assert floors.reading_passages(7) == 2 * 7 * 0.5 * 30 / 100
    assert floors.generating(2) == max(2 * 2 * 40 / 100, 4 * (40 + 2 * 5) / 10)


SHAPES = [(batch, experts, words) for batch in (1, 4, 16) for experts in (0, 1, 4) for words in (25, 100)]


def points(coefficients):
    """Batches whose times follow the formula in the docstring of `benchmarks.cost_model`."""
    fixed, row, expert, start, passage, token = coefficients
    return [
        Point(
            b,
            k,
            length,
            cold,
            fixed + row * b + expert * b * k + cold * (start + passage * b * k + token * b * k * length),
        )
        for b, k, length in SHAPES
        for cold in ((False, True) if k else (False,))
    ]


def test_the_cost_model_recovers_the_coefficients():
    coefficients = (0.3, 0.02, 0.004, 0.1, 0.003, 0.00002)
    measured = points(coefficients)
    model = CostModel.fitted(measured)
    assert model.coefficients == pytest.approx(coefficients, rel=1e-6)
    assert model.deviation(measured) == pytest.approx(0, abs=1e-9)
    assert model.seconds(8, 2, 50, True) == pytest.approx(0.3 + 0.16 + 0.064 + 0.1 + 0.048 + 0.016)


def test_a_term_without_measurements_is_zero():
    measured = [point for point in points((0.3, 0.02, 0.004, 0, 0, 0)) if not point.cold]
    assert CostModel.fitted(measured).coefficients[3:] == (0, 0, 0)


def test_the_picture_has_a_curve_for_every_batch_size_and_number_of_experts(tmp_path, monkeypatch):
    labels = []
    figure = evaluation.CostModel.fitted(points((0.3, 0.02, 0.004, 0.1, 0.003, 0.00002)))
    monkeypatch.setattr(
        "benchmarks.cost_model._curve", lambda axes, chosen, model, over, label, colour: labels.append((over, label))
    )
    shapes = [Point(b, k, 100, False, 1.0) for b in (1, 4) for k in (0, 1, 4)] + [Point(4, 4, 25, False, 1.0)]
    draw(shapes, figure, tmp_path / "cost.png")
    assert labels == [
        ("batch", "closed-book"),
        ("batch", "K = 1"),
        ("batch", "K = 4"),
        ("experts", "batch 1"),
        ("experts", "batch 4"),
        ("words", "batch 4, K = 4"),
    ]
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")


def test_questions_differ_and_are_reproducible(docs):
    texts = [ctx["text"] for doc in docs for ctx in doc["ctxs"]]
    assert len(set(texts)) == len(texts) == TINY.questions * evaluation.PASSAGES
    assert evaluation.questions(TINY.questions, words=12) == docs


def test_the_llm_never_ends_an_answer(models):
    assert isinstance(models.model, nn.Module)
    weight = models.model.get_input_embeddings().weight
    end = models.tokenizer.eos_token_id
    assert not weight[end].any() and weight[end + 2 :].any(1).all()
