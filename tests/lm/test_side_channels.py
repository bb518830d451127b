"""Side channels: if lm-eval uses an unexpected order, there is an error, and no row gets another row's experts."""

from __future__ import annotations

import pytest
import torch
from lm_eval.api.model import CacheHook, hash_args

from genpoe_plugin.data.questions import Question
from genpoe_plugin.lm.side_channels import BatchExperts, OriginalKeys, PlacedContext, Windows
from genpoe_plugin.prompts import Prompt
from genpoe_plugin.selection.pipeline import Selection


def selection(*strings: str) -> Selection:
    return Selection("t", Question("who", ()), strings=strings, gates=(1 / max(1, len(strings)),) * len(strings))


def placed(text: str, original: str = "as asked", *strings: str) -> PlacedContext:
    return PlacedContext(Prompt(text, 0, len(strings)), original, selection(*strings))


@pytest.fixture
def batch(make_lm) -> BatchExperts:
    return make_lm()._batch


IDS = torch.tensor([[1, 2, 3, 0], [4, 5, 6, 7]])


def test_a_batch_in_another_order_is_an_error(batch):
    rows = [(selection("a barber"), 1), (selection("an opera", "a dog"), 2)]
    batch.prepare(rows, [[1, 2, 3], [4, 5, 6, 7]])
    with batch.injected(IDS):
        assert batch.rows.start.tolist() == [1, 2] and batch.rows.gates.tolist() == [[1, 0], [0.5, 0.5]]
    with pytest.raises(AssertionError, match="another order"), batch.injected(IDS.flip(0)):
        pass
    batch.prepare(rows[:1])
    with pytest.raises(AssertionError, match="other rows"), batch.injected(IDS):
        pass


def test_a_probe_has_the_most_experts_in_every_row_and_leaves_the_batch_alone(batch, monkeypatch):
    calls = []
    rows = batch._store.rows
    monkeypatch.setattr(batch._store, "rows", lambda *args: calls.append(args) or rows(*args))
    batch.foresee([selection(), selection("an opera", "a dog"), selection("a barber")])
    batch.prepare([(selection("a barber"), 3)], [[1, 2, 3]])
    prepared = batch.rows
    with batch.probing(), batch.injected(IDS):
        pass
    assert calls[-1] == ([("an opera", "a dog")] * 2, [(0.5, 0.5)] * 2, [0, 0])
    assert batch.rows is prepared


def test_windows_beyond_the_last_are_of_anyone():
    first, second = selection("a"), selection("b")
    windows = Windows([first, second])
    assert [windows.next() for _ in range(3)] == [first, second, second]


def test_an_answer_is_kept_under_the_prompt_that_was_asked():
    hook = CacheHook(None)
    hook.dbdict = {}
    options = {"until": ["\n"]}
    OriginalKeys(hook).add_partial("generate_until", (placed("with passages", "as asked"), options), "yes")
    assert hook.dbdict == {hash_args("generate_until", ("as asked", options)): "yes"}


def test_a_placed_context_is_the_text_to_everybody_else():
    context = placed("with passages")
    assert context == "with passages" and hash(context) == hash("with passages")
    assert context + "." == "with passages." and type(context + ".") is str
