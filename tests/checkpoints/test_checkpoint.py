from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from genpoe_plugin.checkpoints.checkpoint import (
    CONFIG,
    WEIGHTS,
    checkpoint_fingerprint,
    load_hypernetwork,
    save_hypernetwork,
)
from genpoe_plugin.errors import InputError
from genpoe_plugin.experts.config import HypernetworkConfig
from genpoe_plugin.experts.generator import ExpertGenerator
from genpoe_plugin.experts.hypernetwork import Hypernetwork
from genpoe_plugin.training.creation import attention_config, create_attention_experts


@pytest.fixture
def llm(make_llm):
    return make_llm("llama")


@pytest.fixture
def config():
    return HypernetworkConfig(hidden_size=32, layers=(1,), rank=4, expert_width=16, base="random")


@pytest.fixture
def saved(tmp_path, llm, tokenizer, config):
    hypernetwork = Hypernetwork(config)
    save_hypernetwork(tmp_path / "checkpoint", hypernetwork, llm, tokenizer, {"seed": 0})
    return tmp_path / "checkpoint", hypernetwork


@pytest.mark.parametrize(
    "form", [{}, {"head": "factored", "states": "contextual", "value_size": 5}, {"head": "memory"}, {"encoder": "mean"}]
)
def test_save_and_load_is_identity(tmp_path, config, form, llm, tokenizer):
    """The random base included: the research code drew another one at every start."""
    hypernetwork = Hypernetwork(replace(config, **form))
    save_hypernetwork(tmp_path / "checkpoint", hypernetwork, llm, tokenizer, {})
    loaded = load_hypernetwork(tmp_path / "checkpoint", llm, tokenizer)
    assert loaded.config == hypernetwork.config
    states, mask = torch.randn(3, 5, 32), torch.ones(3, 5, dtype=torch.bool)
    ours, theirs = loaded(states, mask), hypernetwork(states, mask)
    for weight, other in zip(ours.weights, theirs.weights, strict=True):
        assert torch.equal(weight, other)
    x, gates = torch.randn(3, 4, 32), torch.ones(3, 1)
    assert torch.equal(ours.unsqueeze(1).mix(x, gates), theirs.unsqueeze(1).mix(x, gates))


def test_attention_experts_save_and_load(tmp_path, llm, tokenizer):
    """What is learned, the bias, included; the layers and heads too."""
    every = attention_config(llm, (0, 2))
    hypernetwork = Hypernetwork(replace(every, kv_heads=((1,), (0, 1))))
    hypernetwork.head.bias.data.normal_()
    save_hypernetwork(tmp_path / "checkpoint", hypernetwork, llm, tokenizer, {})
    loaded = load_hypernetwork(tmp_path / "checkpoint", llm, tokenizer)
    assert loaded.config == hypernetwork.config
    units, mask = torch.randn(2, 5, *hypernetwork.state_shape), torch.ones(2, 5, dtype=torch.bool)
    ours, theirs = loaded(units, mask), hypernetwork(units, mask)
    assert torch.equal(ours.units, theirs.units) and torch.equal(ours.bias, theirs.bias)
    assert ours.shape == theirs.shape and ours.bias.shape == (2, 4) and ours.bias.any()


def test_attention_experts_of_another_llm_are_refused(tmp_path, make_llm, tokenizer):
    llm = make_llm("llama")
    create_attention_experts(tmp_path / "checkpoint", attention_config(llm), llm, tokenizer)
    load_hypernetwork(tmp_path / "checkpoint", llm.bfloat16(), tokenizer)
    for other, message in (
        (make_llm("llama", seed=1), "other embeddings"),
        (make_llm("llama", num_hidden_layers=4), "num_hidden_layers 3 there, 4 here"),
        (make_llm("mistral"), "model_type llama there, mistral here"),
    ):
        with pytest.raises(InputError, match=message) as error:
            load_hypernetwork(tmp_path / "checkpoint", other, tokenizer)
        assert "genpoe experts create" in str(error.value) and "\n" not in str(error.value)


def test_attention_experts_of_other_heads_are_refused(make_llm, tokenizer):
    """The same embeddings, and other keys and values."""
    config = attention_config(make_llm("llama"))
    with pytest.raises(InputError, match="hypernetwork num_kv_heads is 2, the LLM's is 4"):
        ExpertGenerator(Hypernetwork(config), make_llm("llama", num_key_value_heads=4), tokenizer)
    with pytest.raises(InputError, match="layer 2 is not in LlamaForCausalLM"):
        ExpertGenerator(Hypernetwork(config), make_llm("llama", num_hidden_layers=2), tokenizer)


def test_a_checkpoint_from_before_experts_stood_in_several_layers(saved, llm, tokenizer):
    directory, hypernetwork = saved
    record = json.loads((directory / CONFIG).read_text())
    form = record["hypernetwork"]
    (form["layer"],) = form.pop("layers")
    for field in ("num_heads", "num_kv_heads", "head_width", "kv_heads"):
        del form[field]
    (directory / CONFIG).write_text(json.dumps(record))
    assert load_hypernetwork(directory, llm, tokenizer).config == hypernetwork.config


def test_a_checkpoint_from_before_there_were_two_heads(saved, llm, tokenizer):
    """Its configuration lacks what was added since."""
    directory, hypernetwork = saved
    record = json.loads((directory / CONFIG).read_text())
    for field in ("states", "core_size", "value_size"):
        del record["hypernetwork"][field]
    (directory / CONFIG).write_text(json.dumps(record))
    loaded = load_hypernetwork(directory, llm, tokenizer)
    assert loaded.config == hypernetwork.config
    assert all(torch.equal(tensor, hypernetwork.state_dict()[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": 1}, "unknown field colour"),
        ({"head": "sparse"}, "head is 'sparse'; it must be one of dense, factored, memory"),
        ({"head": "factored"}, "damaged, or its shapes differ"),
    ],
)
def test_a_configuration_of_another_hypernetwork_is_refused(saved, llm, tokenizer, change, message):
    record = json.loads((saved[0] / CONFIG).read_text())
    record["hypernetwork"].update(change)
    (saved[0] / CONFIG).write_text(json.dumps(record))
    with pytest.raises(InputError, match=message) as error:
        load_hypernetwork(saved[0], llm, tokenizer)
    assert "\n" not in str(error.value)


def test_any_precision_of_the_same_llm_will_do(saved, llm, tokenizer):
    load_hypernetwork(saved[0], llm.bfloat16(), tokenizer)


def test_another_llm_is_refused_and_named(saved, make_llm, tokenizer):
    with pytest.raises(InputError, match="other embeddings"):
        load_hypernetwork(saved[0], make_llm("llama", seed=1), tokenizer)
    with pytest.raises(InputError, match="num_hidden_layers 3 there, 4 here"):
        load_hypernetwork(saved[0], make_llm("llama", num_hidden_layers=4), tokenizer)


def test_another_tokenizer_is_refused(saved, llm, tokenizer):
    other = tokenizer.__class__.from_pretrained(_saved_with_another_token(tokenizer, saved[0].parent / "other"))
    with pytest.raises(InputError, match="tokenizer"):
        load_hypernetwork(saved[0], llm, other)


def _saved_with_another_token(tokenizer, directory):
    tokenizer.save_pretrained(directory)
    content = json.loads((directory / "tokenizer.json").read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 9999, "content": "<extra>"})
    (directory / "tokenizer.json").write_text(json.dumps(content))
    return directory


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
def test_a_missing_file_is_named(saved, llm, tokenizer, file):
    (saved[0] / file).unlink()
    with pytest.raises(InputError, match=rf"{file} is missing; a checkpoint has config.json and model.safetensors"):
        load_hypernetwork(saved[0], llm, tokenizer)


@pytest.mark.parametrize("keep", [0, 10, 2000])
def test_truncated_weights_are_refused_in_one_line(saved, llm, tokenizer, keep):
    weights = saved[0] / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(InputError, match="damaged") as error:
        load_hypernetwork(saved[0], llm, tokenizer)
    assert "\n" not in str(error.value)


class Planted:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("write", [pickle.dump, torch.save])
def test_a_pickle_in_the_place_of_weights_is_refused_unread(saved, llm, tokenizer, tmp_path, write):
    """Research code: its checkpoints are pickles, which may run anything when they are loaded."""
    with (saved[0] / WEIGHTS).open("wb") as file:
        write(Planted(tmp_path / "planted"), file)
    with pytest.raises(InputError, match="damaged"):
        load_hypernetwork(saved[0], llm, tokenizer)
    assert not (tmp_path / "planted").exists()


def test_what_is_written_is_safetensors_and_json(saved):
    directory, hypernetwork = saved
    assert {path.name for path in directory.iterdir()} == {CONFIG, WEIGHTS}
    json.loads((directory / CONFIG).read_text())
    with safe_open(directory / WEIGHTS, "pt") as file:
        assert set(file.keys()) == set(hypernetwork.state_dict())


def test_damaged_and_foreign_configurations_are_refused(saved, llm, tokenizer):
    config = saved[0] / CONFIG
    config.write_text('{"format"')
    with pytest.raises(InputError, match="not JSON"):
        load_hypernetwork(saved[0], llm, tokenizer)
    config.write_text('{"model_type": "llama"}')
    with pytest.raises(InputError, match="not a hypernetwork"):
        load_hypernetwork(saved[0], llm, tokenizer)


def test_no_such_checkpoint(tmp_path, llm, tokenizer):
    with pytest.raises(InputError, match="neither a directory nor"):
        load_hypernetwork(tmp_path / "nothing", llm, tokenizer)


def test_the_fingerprint_is_of_the_content(saved, tmp_path, llm, tokenizer):
    directory, hypernetwork = saved
    copy = tmp_path / "copy"
    save_hypernetwork(copy, hypernetwork, llm, tokenizer, {"seed": 0})
    assert checkpoint_fingerprint(copy) == checkpoint_fingerprint(directory)
    save_hypernetwork(copy, hypernetwork, llm, tokenizer, {"seed": 1})
    assert checkpoint_fingerprint(copy) != checkpoint_fingerprint(directory)
