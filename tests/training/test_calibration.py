"""Which layers are kept: losses against the LLM with masks of our own, the choice against costs that are known."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from genpoe_plugin.errors import InputError
from genpoe_plugin.experts.config import HypernetworkConfig
from genpoe_plugin.prompts import closed_book_prompt
from genpoe_plugin.training.calibration import (
    AnswerLoss,
    Calibration,
    Limits,
    Point,
    calibrate,
    calibrate_on,
    choose,
    with_parts,
    write_calibration,
)
from genpoe_plugin.training.creation import attention_config
from genpoe_plugin.training.examples import TrainingExample

EXAMPLES = [
    TrainingExample("who wrote the opera", "Gioachino Rossini", "Rossini: the opera is by Gioachino Rossini."),
    TrainingExample("where is it", "Canberra", "The capital is Canberra, which was founded in 1913."),
    TrainingExample("what did she discover", "radium", "Marie Curie discovered radium."),
]
LAYERS = 8


@pytest.fixture(scope="module")
def llm(make_llm):
    return make_llm("llama")


@pytest.fixture(scope="module")
def config(llm):
    return attention_config(llm)


def question_and_answer(tokenizer, example):
    prompt = closed_book_prompt(example.question)
    whole = tokenizer(f"{prompt} {example.answer}")["input_ids"]
    return whole, len(whole) - len(tokenizer(prompt)["input_ids"])


@torch.no_grad()
def nats(llm, tokenizer, example, seen=None) -> float:
    """Of one answer; the passage stands before the question, which sees it where ``seen`` has layer and KV head."""
    own, count = question_and_answer(tokenizer, example)
    passage = tokenizer(f"Knowledge:\n{example.passage}\n")["input_ids"] if seen is not None else []
    ids, heads, handles = torch.tensor([passage + own]), llm.config.num_attention_heads, []
    for layer, block in enumerate(llm.model.layers):
        mask = torch.ones(1, heads, ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        for head in range(heads):
            if seen is not None and (layer, head // (heads // llm.config.num_key_value_heads)) not in seen:
                mask[:, head, len(passage) :, : len(passage)] = False

        def masked(module, args, kwargs, mask=mask):
            return args, {**kwargs, "attention_mask": mask}

        handles.append(block.self_attn.register_forward_pre_hook(masked, with_kwargs=True))
    try:
        losses = -llm(ids).logits[0, :-1].double().log_softmax(-1)
    finally:
        for handle in handles:
            handle.remove()
    return float(sum(losses[place - 1, ids[0, place]] for place in range(ids.shape[1] - count, ids.shape[1])) / count)


EVERY = {(layer, head) for layer in range(3) for head in range(2)}


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_losses_equal_those_of_the_llm_with_masks(llm, bare_tokenizer, config, batch_size):
    loss = AnswerLoss(EXAMPLES, llm, bare_tokenizer, config, batch_size)

    def mean(seen) -> float:
        return sum(nats(llm, bare_tokenizer, example, seen) for example in EXAMPLES) / len(EXAMPLES)

    found = [loss.without_experts(False), loss.with_experts(config)]
    assert found == pytest.approx([mean(None), mean(EVERY)], abs=1e-4)
    for seen in ({(1, 0), (1, 1)}, {(0, 0), (0, 1), (2, 0), (2, 1)}, {(0, 1), (2, 0), (2, 1)}):
        some = with_parts(config, [tuple(seen)])
        found.append(loss.with_experts(some))
        assert found[-1] == pytest.approx(mean(seen), abs=1e-4)
    assert all(abs(a - b) > 1e-3 for n, a in enumerate(found) for b in found[:n]), "they are told apart"
    assert loss.with_experts(config) == found[1], "nothing stays in the LLM"


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3"])
def test_layers_below_the_first_difference_are_not_run_again_and_losses_are_the_same(make_llm, bare_tokenizer, name):
    llm = make_llm(name)
    every = attention_config(llm)
    loss = AnswerLoss(EXAMPLES, llm, bare_tokenizer, every, batch_size=2)
    first_head = with_parts(every, [((0, 0),), ((1, 0),), ((2, 0),)])
    without = [replace(every, layers=tuple(layer for layer in every.layers if layer != out)) for out in every.layers]
    # Each with the lowest layer in which it is not as ``every``.
    choices = [(every, None), *zip(without, every.layers, strict=True), (first_head, 0)]
    expected = [loss.with_experts(choice) for choice, _ in choices]
    runs: list[int] = []
    handles = [
        layer.self_attn.register_forward_hook(lambda *_, number=number: runs.append(number))
        for number, layer in enumerate(llm.model.layers)
    ]
    for near in (every, first_head):
        for (choice, lowest), value in zip(choices, expected, strict=True):
            loss.with_experts(near, near)
            runs.clear()
            assert loss.with_experts(choice, near) == pytest.approx(value, rel=1e-6)
            if near is every:
                assert runs == ([] if lowest is None else 2 * list(range(lowest, len(every.layers)))), "of two batches"
    for handle in handles:
        handle.remove()
    assert loss.with_experts(every) == expected[0], "nothing stays in the LLM"


def test_the_passage_in_the_prompt(llm, bare_tokenizer, config):
    """As one text, which the tokenizer may split otherwise where passage and question meet."""
    loss = AnswerLoss(EXAMPLES, llm, bare_tokenizer, config).without_experts(True)
    expected = 0.0
    for example in EXAMPLES:
        _, count = question_and_answer(bare_tokenizer, example)
        text = f"Knowledge:\n{example.passage}\n{closed_book_prompt(example.question)} {example.answer}"
        ids = torch.tensor([bare_tokenizer(text)["input_ids"]])
        with torch.no_grad():
            losses = -llm(ids).logits[0, :-1].double().log_softmax(-1)
        expected += float(sum(losses[-place, ids[0, -place]] for place in range(1, count + 1))) / count / len(EXAMPLES)
    assert loss == pytest.approx(expected, abs=1e-4)


def test_the_mean_length_is_that_of_the_passages(llm, tokenizer, config):
    loss = AnswerLoss(EXAMPLES, llm, tokenizer, config)
    lengths = [len(tokenizer(f"Knowledge:\n{e.passage}\n", add_special_tokens=False)["input_ids"]) for e in EXAMPLES]
    assert loss.mean_tokens == pytest.approx(sum(lengths) / len(lengths))


class Known:
    """A loss that is known: each part that is left out costs its own price."""

    def __init__(self, prices: dict[tuple[int, int], float], kv_heads: int) -> None:
        self.prices, self.asked = prices, []
        self.model, self.mean_tokens, self._batches = SimpleNamespace(dtype=torch.float32), 10.0, [[1, 2], [3]]
        layers = tuple(sorted({layer for layer, _ in prices}))
        sizes = {"num_heads": 4, "num_kv_heads": kv_heads, "head_width": 8}
        self.config = HypernetworkConfig.preset("attention", hidden_size=32, layers=layers, **sizes)

    def without_experts(self, knowledge: bool) -> float:
        self.asked.append(knowledge)
        return 1.0 if knowledge else 2.0 + sum(self.prices.values())

    def with_experts(self, config: HypernetworkConfig, near: HypernetworkConfig) -> float:
        assert pairs(config) <= pairs(near), "its nearest is the selection that it leaves a part of"
        self.asked.append(config)
        return 2.0 + sum(price for part, price in self.prices.items() if part not in pairs(config))


def pairs(config: HypernetworkConfig) -> set[tuple[int, int]]:
    every = (tuple(range(config.num_kv_heads)),) * len(config.layers)
    return {(layer, head) for layer, own in zip(config.layers, config.kv_heads or every, strict=True) for head in own}


def layer_prices():
    return {(layer, 0): float(2 ** ((5 * layer) % LAYERS)) for layer in range(LAYERS)}


def test_parts_leave_cheapest_first_until_one_is_left(tmp_path):
    loss = Known(layer_prices(), 1)
    found = calibrate(loss, Limits(max_layers=3), tmp_path / "progress", {})
    order = sorted(range(LAYERS), key=lambda layer: loss.prices[layer, 0], reverse=True)
    assert [point.config.layers for point in found.points] == [
        tuple(sorted(order[:count])) for count in (8, 6, 4, 3, 2, 1)
    ]
    gain = sum(loss.prices.values())
    for point in found.points:
        missing = sum(price for part, price in loss.prices.items() if part[0] not in point.config.layers)
        assert point.nats == pytest.approx(2.0 + missing) and point.gain_share == pytest.approx(1 - missing / gain)
        assert point.bytes == len(point.config.layers) * 2 * 8 * 4 * 10
    assert found.chosen is found.points[3]
    assert (found.closed_book, found.prompt, found.questions) == (2.0 + gain, 1.0, 3)


def test_heads_leave_one_by_one(tmp_path):
    prices = {(0, 0): 1.0, (0, 1): 64.0, (1, 0): 2.0, (1, 1): 4.0, (2, 0): 32.0, (2, 1): 16.0}
    found = calibrate(Known(prices, 2), Limits(max_bytes=3 * 2 * 8 * 4 * 10), tmp_path / "progress", {}, heads=True)
    assert [pairs(point.config) for point in found.points] == [
        set(sorted(prices, key=prices.__getitem__, reverse=True)[:count]) for count in (6, 4, 3, 2, 1)
    ]
    assert (found.chosen.config.layers, found.chosen.config.kv_heads) == ((0, 2), ((1,), (0, 1)))
    assert found.points[0].config.kv_heads is None


def test_layers_go_with_all_their_heads(tmp_path):
    found = calibrate(
        Known({(0, 0): 1.0, (0, 1): 64.0, (1, 0): 2.0, (1, 1): 4.0}, 2), Limits(max_layers=1), tmp_path / "p", {}
    )
    assert [(point.config.layers, point.config.kv_heads) for point in found.points] == [((0, 1), None), ((0,), None)]


def test_where_experts_gain_nothing_there_is_no_share_to_keep(tmp_path):
    """Said before the parts are measured."""
    loss = Known({(0, 0): -1.0, (1, 0): 0.5}, 1)
    with pytest.raises(
        InputError, match=r"experts in all layers and 1[.]500 without experts: there is no gain"
    ) as error:
        calibrate(loss, Limits(keep=0.9), tmp_path / "progress", {})
    assert "\n" not in str(error.value) and len(loss.asked) == 3
    calibrate(loss, Limits(max_layers=1), tmp_path / "progress", {})


def test_parts_of_a_configuration(config):
    assert with_parts(config, [((0, 0), (0, 1)), ((2, 0), (2, 1))]) == replace(config, layers=(0, 2))
    some = with_parts(config, [((2, 1),), ((0, 1),), ((0, 0),)])
    assert (some.layers, some.kv_heads) == ((0, 2), ((0, 1), (1,)))
    assert with_parts(config, [tuple(sorted(EVERY))]) == config


def point(layers: int, nats: float, kept: float, bytes_: int) -> Point:
    sizes = {"num_heads": 4, "num_kv_heads": 2, "head_width": 8}
    return Point(
        HypernetworkConfig.preset("attention", hidden_size=32, layers=tuple(range(layers)), **sizes),
        nats,
        kept,
        bytes_,
    )


POINTS = [point(4, 1.0, 1.0, 400), point(3, 0.9, 1.1, 300), point(2, 1.2, 0.8, 200), point(1, 1.9, 0.1, 100)]


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"max_layers": 9}, 1),  # of least loss, which need not be the largest
        ({"max_layers": 2}, 2),
        ({"max_layers": 1}, 3),
        ({"max_bytes": 299}, 2),
        ({"max_bytes": 300}, 1),
        ({"keep": 0.8}, 2),  # the smallest that keep it
        ({"keep": 1.0}, 1),
        ({"keep": 0.05}, 3),
        ({"keep": 0.5, "max_layers": 3}, 2),
        ({"max_layers": 3, "max_bytes": 250}, 2),
        ({"keep": 0.1, "max_layers": 3, "max_bytes": 250}, 3),
    ],
)
def test_the_point_that_fits(limits, expected):
    assert choose(POINTS, Limits(**limits)) is POINTS[expected]


@pytest.mark.parametrize(
    "limits", [{"max_bytes": 99}, {"keep": 0.9, "max_layers": 2}, {"keep": 0.81, "max_bytes": 200}]
)
def test_where_nothing_fits_it_is_said_in_one_line(limits):
    with pytest.raises(InputError, match="the smallest expert has 100 bytes") as error:
        choose(POINTS, Limits(**limits))
    assert "\n" not in str(error.value)


def test_a_limit_is_needed():
    with pytest.raises(InputError, match="needs a limit: max_layers, max_bytes or keep"):
        Limits()


class Stops(Known):
    """Interrupted at its n-th measurement."""

    def __init__(self, *args, after: int) -> None:
        super().__init__(*args)
        self.after = after

    def with_experts(self, config: HypernetworkConfig, near: HypernetworkConfig) -> float:
        if len(self.asked) == self.after:
            raise KeyboardInterrupt
        return super().with_experts(config, near)


@pytest.mark.parametrize("killed", [None, 1, 5])
def test_what_was_measured_is_not_measured_again(tmp_path, killed):
    """Also where a run was killed as it wrote (so many characters are missing), and another interrupted after that."""
    progress, limits = tmp_path / "progress", Limits(max_layers=3)
    whole = Known(layer_prices(), 1)
    expected = calibrate(whole, limits, tmp_path / "other", {})
    first = Stops(layer_prices(), 1, after=6)
    second = Stops(layer_prices(), 1, after=9)
    for loss in (first, second):
        with pytest.raises(KeyboardInterrupt):
            calibrate(loss, limits, progress, {})
        if loss is first and killed:
            progress.write_text(progress.read_text()[:-killed])
    third = Known(layer_prices(), 1)
    assert calibrate(third, limits, progress, {}) == expected
    again = int(killed is not None)
    asked = first.asked + second.asked[again:] + third.asked
    assert asked == whole.asked and len(set(map(str, asked))) == len(asked)
    done = Known(layer_prices(), 1)
    assert calibrate(done, limits, progress, {}) == expected and not done.asked


def test_another_choice_needs_no_other_measurements(tmp_path):
    calibrate(Known(layer_prices(), 1), Limits(max_layers=3), tmp_path / "progress", {})
    again = Known(layer_prices(), 1)
    assert len(calibrate(again, Limits(max_layers=1), tmp_path / "progress", {}).chosen.config.layers) == 1
    assert not again.asked


@pytest.mark.parametrize("change", [{"seed": 3}, {"num_questions": 2}, {"heads": True}, {"llm": 1}])
def test_measurements_of_another_calibration_are_refused(make_llm, bare_tokenizer, config, tmp_path, change):
    questions, progress = tmp_path / "questions.jsonl", tmp_path / "progress"
    rows = [
        {"question": e.question, "answers": [e.answer], "ctxs": [{"id": "1", "title": "T", "text": e.passage}]}
        for e in EXAMPLES
    ]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    llms = {seed: make_llm("llama", seed=seed) for seed in (0, 1)}

    def run(llm: int = 0, **options):
        limits = Limits(max_bytes=1)  # which nothing fits, so that the file stays
        return calibrate_on([str(questions)], llms[llm], bare_tokenizer, config, limits, progress, **options)

    with pytest.raises(InputError, match="within the limits"):
        run()
    before = progress.read_bytes()
    with pytest.raises(InputError, match="measurements of another calibration; delete the file") as error:
        run(**change)
    assert "\n" not in str(error.value) and progress.read_bytes() == before
    with pytest.raises(InputError, match="within the limits"):
        run(batch_size=1)
    assert progress.read_bytes() == before


def test_the_curve_is_written(tmp_path):
    write_calibration(tmp_path, Calibration(tuple(POINTS), POINTS[2], 2.0, 0.8, 3))
    with (tmp_path / "calibration.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["layers"] for row in rows] == ["", "0 1 2 3", "0 1 2", "0 1", "0", ""]
    assert [row["chosen"] for row in rows] == ["False"] * 3 + ["True"] + ["False"] * 2
    assert [float(row["nats"]) for row in rows] == [2.0, 1.0, 0.9, 1.2, 1.9, 0.8]
    assert float(rows[-1]["kept"]) == pytest.approx(1.2)
    assert (tmp_path / "calibration.png").read_bytes().startswith(b"\x89PNG")
