"""The store with experts of many units, against the LLM's own cache and against a plain model of what is remembered."""

from __future__ import annotations

import json
import math
import random
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import load_file, save_file

from genpoe_plugin.experts import store as store_module
from genpoe_plugin.experts.expert_files import PASSAGES, UNITS, ExpertFiles
from genpoe_plugin.experts.generator import ExpertGenerator
from genpoe_plugin.experts.hypernetwork import Hypernetwork
from genpoe_plugin.experts.store import ExpertStore
from genpoe_plugin.experts.unit_pool import UnitPool
from genpoe_plugin.training.creation import attention_config
from tests.experts.test_store import PASSAGES as TEXTS
from tests.experts.test_store import Recorder, ragged_batch

FORMS = [{}, {"layers": (0, 2), "kv_heads": ((1,), (0, 1))}]


@pytest.fixture(scope="module")
def llm(make_llm):
    return make_llm("llama")


@pytest.fixture
def make_hypernetwork(llm):
    def make(**form) -> Hypernetwork:
        config = attention_config(llm)
        return Hypernetwork(config.from_dict({**config.to_dict(), **form})).eval().requires_grad_(False)

    return make


@pytest.fixture(scope="module")
def by_hand(llm, tokenizer):
    """``by_hand(passage, form)``: its units, read off the cache that the LLM itself would keep."""

    @torch.no_grad()
    def units(passage: str, form: dict) -> torch.Tensor:
        ids = tokenizer(f"Knowledge:\n{passage}\n", return_tensors="pt")["input_ids"]
        positions = torch.arange(-ids.shape[1], 0).unsqueeze(0)
        cache = llm(ids, position_ids=positions, use_cache=True).past_key_values
        layers = form.get("layers", (0, 1, 2))
        tokens = []
        for token in range(1, ids.shape[1]):  # without BOS
            parts = []
            for layer, heads in zip(layers, form.get("kv_heads", ((0, 1),) * len(layers)), strict=True):
                for side in (cache.layers[layer].keys, cache.layers[layer].values):
                    parts += [side[0, head, token] for head in heads]
            tokens.append(torch.stack(parts))
        return torch.stack(tokens)

    return units


@pytest.fixture(scope="module")
def lengths(tokenizer):
    """How many units each passage's expert has, by letter."""
    count = {}
    for letter, text in TEXTS.items():
        count[letter] = len(tokenizer(f"Knowledge:\n{text}\n", add_special_tokens=False)["input_ids"])
    assert len(set(count.values())) > 3
    return count


@pytest.fixture
def make_store(llm, tokenizer, make_hypernetwork, monkeypatch, lengths):
    """``make_store(room=None, form={}, **options)``: a store with room for so many units (one expert at least)."""

    def make(room: int | None = None, form: dict | None = None, **options) -> Recorder:
        network = make_hypernetwork(**(form or {}))
        if room is not None:
            monkeypatch.setattr(store_module, "MAX_EXPERT_UNITS", max(lengths.values()))
            options["device_bytes"] = room * math.prod(network.state_shape) * 4
        return Recorder(ExpertStore(network, llm, tokenizer, **options))

    return make


def flat(found, letters):
    """The units of one-passage rows, without what is beyond each."""
    return {letter: found.experts.units[row][found.gates[row] > 0] for row, letter in enumerate(letters)}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("batch_size", "experts"), [(64, None), (2, 1.5), (1, 1)])
def test_rows_hold_the_units_of_their_passages_side_by_side(
    make_store, by_hand, tokenizer, lengths, form, batch_size, experts
):
    """Whatever the rows, and also where the budget holds less than one batch needs."""
    room = None if experts is None else int(experts * max(lengths.values()))
    store = make_store(room, form, batch_size=batch_size).store
    expected = {text: by_hand(text, form) for text in TEXTS.values()}
    for seed in range(8):
        passages, gates, start = ragged_batch(seed)
        rows = store.rows(passages, gates, start)
        served = [number for number, row in enumerate(passages) if row]
        if not served:
            assert rows is None
            continue
        assert rows.start.tolist() == start
        assert rows.served is None if len(served) == len(passages) else rows.served.tolist() == served
        most = max(sum(len(expected[text]) for text in row) for row in passages)
        assert rows.gates.shape == rows.experts.units.shape[:2] == (len(served), most)
        for number, row in enumerate(served):
            units = torch.cat([expected[text] for text in passages[row]])
            each = [gate for text, gate in zip(passages[row], gates[row], strict=True) for _ in expected[text]]
            torch.testing.assert_close(rows.experts.units[number, : len(units)], units, atol=1e-5, rtol=1e-5)
            assert rows.gates[number].tolist() == pytest.approx([*each, *[0] * (most - len(each))])
            assert rows.experts.units[number, len(units) :].isfinite().all()
        assert store._device_pool.used <= store._device_pool.capacity


@pytest.mark.parametrize("experts", [None, 1.5])
def test_groups_have_the_units_of_their_own_passages(make_store, by_hand, lengths, experts):
    groups = [[TEXTS[letter] for letter in letters] for letters in ("abc", "d", "cad", "fe")]
    room = None if experts is None else int(experts * max(lengths.values()))
    for group, found in zip(groups, make_store(room, batch_size=2).store.experts(groups), strict=True):
        expected = torch.cat([by_hand(text, {}) for text in group])
        torch.testing.assert_close(found.units, expected, atol=1e-5, rtol=1e-5)


def test_an_expert_is_the_same_in_any_company(llm, tokenizer, make_hypernetwork):
    """Beside longer passages too, whose width it is padded to."""
    generator = ExpertGenerator(make_hypernetwork(), llm, tokenizer)
    texts = list(TEXTS.values())
    states, mask = generator.embed(texts)
    assert mask.sum(1).tolist() == generator.units(texts)
    for number, text in enumerate(texts):
        alone, own = generator.embed([text])
        torch.testing.assert_close(states[number][mask[number]], alone[0][own[0]], atol=1e-5, rtol=1e-5)


def test_a_long_passage_is_cut_before_what_the_prompt_puts_around_it(llm, tokenizer, make_hypernetwork):
    generator = ExpertGenerator(make_hypernetwork(), llm, tokenizer)
    long = TEXTS["a"] * 40
    offsets = tokenizer(long, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    assert len(offsets) > 300
    cut = f"Knowledge:\n{long[: offsets[256][0]].rstrip()}\n"
    assert generator.units([long]) == [len(tokenizer(cut, add_special_tokens=False)["input_ids"])]
    _, mask = generator.embed([long, TEXTS["d"]])
    assert mask.sum(1).tolist() == generator.units([long, TEXTS["d"]])


def test_the_budget_is_of_units_and_the_least_recently_used_leave(make_store, lengths):
    """A list, oldest use first, is the whole model; passages leave until there is room for the new one."""
    room, rng = max(lengths.values()) * 2, random.Random(3)
    recorder, remembered = make_store(room, batch_size=1), []
    for _ in range(60):
        letter = rng.choice("abcdef")
        known = letter in remembered
        remembered = [other for other in remembered if other != letter]
        while sum(lengths[other] for other in remembered) + lengths[letter] > room:
            remembered.pop(0)
        remembered.append(letter)
        recorder.ask(letter)
        assert recorder.generated() == ("" if known else letter)
        assert recorder.store._device_pool.used == sum(lengths[other] for other in remembered)
    assert recorder.held_bytes() <= room * recorder.store._generator.hypernetwork.head.shape.vectors * 8 * 4


def test_the_smallest_budget_holds_any_one_expert(llm, tokenizer, make_hypernetwork):
    store = ExpertStore(make_hypernetwork(), llm, tokenizer, device_bytes=1)
    long = TEXTS["a"] * 40
    assert store.rows([[long]], [[1.0]], [0]).gates.shape == (1, store.units([long])[0])


def test_no_more_is_prepared_than_the_budget_holds(make_store, lengths):
    recorder = make_store(lengths["a"] + lengths["b"] + 1)
    recorder.store.prepare(TEXTS.values(), progress=False)
    assert sorted(recorder.generated()) == ["a", "b"]
    recorder.ask("ab")
    assert recorder.generated() == ""


def test_what_the_device_drops_the_host_keeps(make_store, lengths):
    recorder = make_store(max(lengths.values()), batch_size=2)
    recorder.store._host_pool = UnitPool(sum(lengths.values()), recorder.store._form.weights, torch.device("cpu"))
    first = {letter: recorder.ask(letter).experts.units for letter in "abcdef"}
    assert recorder.generated() == "abcdef"
    for letter in "fdbeca":
        assert torch.equal(recorder.ask(letter).experts.units, first[letter])
    assert recorder.generated() == ""


@pytest.mark.parametrize("room", [None, 40])
def test_a_later_run_finds_experts_of_any_length_on_disk(make_store, tmp_path, room):
    first = make_store(files=ExpertFiles(tmp_path, "abc"), batch_size=2)
    expected = flat(first.ask("abcd"), "abcd")
    later = make_store(room, files=ExpertFiles(tmp_path, "abc"), batch_size=3)
    later.store.prepare([TEXTS[letter] for letter in "ab"], progress=False)
    for letters in ("dcba", "bd"):
        for letter, units in flat(later.ask(letters), letters).items():
            assert torch.equal(units, expected[letter])
    assert not later.batches
    later.ask("eb")
    assert later.generated() == "e"
    assert all(TEXTS[letter] in ExpertFiles(tmp_path, "abc") for letter in "abcde")


def test_files_keep_experts_of_different_lengths_apart(tmp_path):
    weights = torch.arange(20.0).view(10, 2)
    files = ExpertFiles(tmp_path, "abc")
    files.write(["one", "three", "two"], (weights[:6],), [1, 3, 2])
    files.write(["four"], (weights[6:],), [4])
    rows = {"one": [0], "three": [1, 2, 3], "two": [4, 5], "four": [6, 7, 8, 9]}
    for opened in (files, ExpertFiles(tmp_path, "abc")):
        assert len(opened) == 4
        for names in (["one"], ["four", "one"], ["two", "four", "three"], ["three", "two", "one", "four"]):
            (found,) = opened.read(names)
            assert torch.equal(found, weights[[row for name in names for row in rows[name]]])


def test_a_file_from_before_there_were_units_is_read(tmp_path):
    """One unit an expert, and nothing said of it."""
    weights = torch.randn(3, 4)
    files = ExpertFiles(tmp_path, "abc")
    files.write(["one", "two", "three"], (weights,))
    (path,) = files.folder.iterdir()
    with_units = ExpertFiles(tmp_path, "abc")._open[path].metadata()
    assert json.loads(with_units[UNITS]) == [1, 1, 1]
    save_file(load_file(path), path, metadata={PASSAGES: with_units[PASSAGES]})
    older = ExpertFiles(tmp_path, "abc")
    assert torch.equal(older.read(["three", "one"])[0], weights[[2, 0]])


@pytest.mark.parametrize("seed", range(6))
def test_a_pool_follows_the_definition(seed):
    """Experts of one to four units come, are used and fail to come; an ordered dictionary is the whole model."""
    rng, capacity = random.Random(seed), 9
    pool = UnitPool(capacity, (torch.empty(0, 2), torch.empty(0)), torch.device("cpu"))
    model: OrderedDict[str, torch.Tensor] = OrderedDict()
    made = 0

    def make_room(count: int) -> list[str]:
        leaving = []
        while sum(map(len, model.values())) + count > capacity:
            leaving.append(model.popitem(last=False)[0])
        return leaving

    for _ in range(150):
        action = rng.choice(["put", "put", "use", "fail", "reserve"])
        if action == "use":
            used = rng.choices([f"e{number}" for number in range(made + 1)], k=3)
            pool.use(used)
            for name in used:
                if name in model:
                    model.move_to_end(name)
        elif action == "reserve":
            pool.reserve(rng.randint(0, 12))
        else:
            units = [rng.randint(1, 4) for _ in range(rng.randint(1, 4))]
            names = [f"e{made + number}" for number in range(len(units))]
            made += len(units)
            numbers = torch.rand(sum(units))
            while action == "fail" and sum(units) > capacity:
                units, names = units[1:], names[1:]
            if action == "put":
                pool.put(names, (numbers[:, None].expand(-1, 2), numbers), units)
                pieces = list(zip(names, numbers.split(units), strict=True))
                while sum(len(piece) for _, piece in pieces) > capacity:
                    pieces.pop(0)
                make_room(sum(len(piece) for _, piece in pieces))
                model.update(pieces)
            else:
                leaving = pool.oldest(sum(units))
                with pytest.raises(KeyboardInterrupt), pool.filling(names, units) as rows:
                    for weight in pool.weights:
                        weight[rows] = -1
                    raise KeyboardInterrupt
                assert make_room(sum(units)) == leaving
        kept = list(model)
        assert len(pool) == len(model) and all(name in pool for name in kept)
        assert pool.used == sum(map(len, model.values())) <= len(pool.weights[0]) <= capacity
        rng.shuffle(kept)
        if kept:
            pairs, single = pool.select(kept)
            expected = torch.cat([model[name] for name in kept])
            assert torch.equal(single, expected) and torch.equal(pairs, expected[:, None].expand(-1, 2))
            slots = [slot for own in pool.slots(kept) for slot in own]
            assert len(set(slots)) == len(slots)
