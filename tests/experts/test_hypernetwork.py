from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from genpoe_plugin.errors import InputError
from genpoe_plugin.experts.config import HypernetworkConfig
from genpoe_plugin.experts.footprint import footprint
from genpoe_plugin.experts.hypernetwork import Hypernetwork

ENCODERS = [{"encoder": "mean"}, {"encoder": "attention"}, {"encoder": "attention", "value_size": 5}]


def skip_memories_without_queries(head, encoder):
    if head == "memory" and encoder["encoder"] != "attention":
        pytest.skip("a memory keeps what queries find")


def states_and_mask(lengths=(5, 2, 7), width=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(len(lengths), max(lengths), width, generator=generator)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    return states, mask


def rms(x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + np.finfo(np.float32).eps)


def naive_find(tokens, query):
    weights = np.exp(tokens @ query)
    return (weights / weights.sum()) @ tokens


def naive_code(hypernetwork, states):
    """The code of one passage, from the definitions in DESIGN, in float64."""
    config, encoder = hypernetwork.config, hypernetwork.encoder
    tokens = states.double().numpy()
    if config.encoder == "mean":
        pooled = tokens.mean(0)
        pooled = rms(pooled) if config.normalise else pooled
    else:
        tokens = rms(tokens) if config.normalise else tokens
        found = []
        for query in encoder.queries.double().numpy():
            found.append(naive_find(tokens, query))
            if config.value_size is not None:
                found[-1] = encoder.values.weight.double().numpy() @ found[-1]
        pooled = np.concatenate(found)
    linear = encoder.project
    return np.maximum(linear.weight.double().numpy() @ pooled + linear.bias.double().numpy(), 0)


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("normalise", [True, False])
def test_factored_experts_equal_the_definition(make_hypernetwork, encoder, normalise):
    hypernetwork = make_hypernetwork(head="factored", normalise=normalise, **encoder)
    states, mask = states_and_mask()
    experts = hypernetwork(states, mask)
    generate, p = hypernetwork.head.generate, 6
    for row in range(3):
        code = naive_code(hypernetwork, states[row][mask[row]])
        flat = 4.0 * (generate.weight.double().numpy() @ code + generate.bias.double().numpy())  # the gain
        up, down = np.eye(p) + flat[: p * p].reshape(p, p), np.eye(p) + flat[p * p :].reshape(p, p)
        np.testing.assert_allclose(experts.core_up[row].numpy(), up, atol=1e-3)
        np.testing.assert_allclose(experts.core_down[row].numpy(), down, atol=1e-3)
    assert [tuple(factor.shape) for factor in experts.factors] == [(p, 32), (16, p), (p, 16), (32, p)]
    learned = {name for name, _ in hypernetwork.head.named_parameters()}
    assert {"read_up", "write_up", "read_down", "write_down"} <= learned


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("base", ["random", "silent"])
def test_memories_equal_the_definition(make_hypernetwork, normalise, base):
    hypernetwork = make_hypernetwork(head="memory", normalise=normalise, base=base, generator_gain=0.7)
    states, mask = states_and_mask()
    experts = hypernetwork(states, mask)
    head = {name: value.double().numpy() for name, value in hypernetwork.head.named_parameters()}
    for row in range(3):
        tokens = states[row][mask[row]].double().numpy()
        tokens = rms(tokens) if normalise else tokens
        up, down = np.eye(6), np.zeros((6, 6))
        for number, query in enumerate(hypernetwork.encoder.queries.double().numpy()):
            found = naive_find(tokens, query)
            up += 0.7 * np.outer(head["address_up"][number], head["keys"] @ found)
            down += 0.7 * np.outer(head["values"] @ found, head["address_down"][number])
        np.testing.assert_allclose(experts.core_up[row].numpy(), up, atol=1e-4)
        np.testing.assert_allclose(experts.core_down[row].numpy(), down, atol=1e-4)
    assert [tuple(factor.shape) for factor in experts.factors] == [(6, 32), (16, 6), (6, 16), (32, 6)]
    np.testing.assert_allclose(head["keys"] @ head["keys"].T, np.eye(6), atol=1e-5)
    np.testing.assert_array_equal(head["read_up"], head["keys"])
    np.testing.assert_array_equal(head["write_down"], head["values"].T)


def test_a_memory_says_what_was_found_where_its_address_is_called(make_hypernetwork):
    """An expert whose value lies in the memory's space writes it unchanged, as many times as it is called."""
    hypernetwork = make_hypernetwork(head="memory", num_queries=1, normalise=False, generator_gain=1.0)
    head = hypernetwork.head
    value = head.values.mT @ torch.arange(1.0, 7.0)
    expert = hypernetwork(value.view(1, 1, -1), torch.ones(1, 1, dtype=torch.bool)).unsqueeze(1)
    x = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(2))
    inner = torch.relu(x @ head.read_up.mT @ expert.core_up[0].mT @ head.write_up.mT) @ head.read_down.mT
    called = inner @ head.address_down[0]
    torch.testing.assert_close(expert.mix(x, torch.ones(1, 1)), called.unsqueeze(-1) * value)


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("gradients", [True, False])
def test_experts_equal_the_definition(make_hypernetwork, monkeypatch, encoder, normalise, gradients):
    """As they are trained, and as they are generated for questions, a part at a time."""
    monkeypatch.setattr("genpoe_plugin.experts.hypernetwork.CPU_BLOCK", 100)
    hypernetwork = make_hypernetwork(normalise=normalise, **encoder)
    states, mask = states_and_mask()
    with torch.set_grad_enabled(gradients):
        experts = hypernetwork(states, mask)
    r, h, d = 4, 16, 32
    generate = hypernetwork.head.generate
    for row in range(3):
        code = naive_code(hypernetwork, states[row][mask[row]])
        flat = 4.0 * (generate.weight.double().numpy() @ code + generate.bias.double().numpy())  # the gain
        place = 0
        for number, shape in enumerate([(r, d), (h, r), (r, h), (d, r)], start=1):
            size = shape[0] * shape[1]
            base = hypernetwork.head.get_buffer(f"base{number}").double().numpy()
            expected = base + flat[place : place + size].reshape(shape)
            np.testing.assert_allclose(experts.weights[number - 1][row].numpy(), expected, atol=1e-3)
            place += size
        assert place == len(flat)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_padding_does_not_matter(make_hypernetwork, head, encoder):
    skip_memories_without_queries(head, encoder)
    hypernetwork = make_hypernetwork(head=head, **encoder)
    states, mask = states_and_mask()
    noisy = torch.where(mask.unsqueeze(-1), states, torch.full_like(states, 1e3))
    for first, second in zip(hypernetwork(states, mask).weights, hypernetwork(noisy, mask).weights, strict=True):
        assert torch.equal(first, second)


def test_the_mean_is_blind_to_order_and_both_tell_passages_apart(make_hypernetwork):
    states, mask = states_and_mask((6, 6))
    for encoder in ("mean", "attention"):
        experts = make_hypernetwork(encoder=encoder)(states, mask)
        assert not torch.allclose(experts.w1[0], experts.w1[1], atol=1e-3)
        turned = make_hypernetwork(encoder=encoder)(states.flip(1), mask)
        assert torch.allclose(experts.w1, turned.w1, atol=1e-4)


def test_a_silent_base_makes_untrained_experts_nearly_silent_and_a_random_one_does_not(make_hypernetwork):
    states, mask = states_and_mask()
    silent = make_hypernetwork(base="silent", generator_gain=0.0)(states, mask)
    assert torch.count_nonzero(silent.w4) == 0
    assert all(torch.count_nonzero(weight) > 0 for weight in silent.weights[:3])
    assert torch.count_nonzero(make_hypernetwork(generator_gain=0.0)(states, mask).w4) > 0


@pytest.mark.parametrize("head", ["factored", "memory"])
def test_untrained_silent_experts_are_exactly_silent(make_hypernetwork, head):
    states, mask = states_and_mask()
    x, gates = torch.randn(3, 4, 32), torch.ones(3, 1)
    silent = make_hypernetwork(head=head, base="silent")(states, mask).unsqueeze(1)
    assert torch.count_nonzero(silent.mix(x, gates)) == 0
    loud = make_hypernetwork(head=head)(states, mask).unsqueeze(1)
    assert (loud.mix(x, gates).abs().mean((1, 2)) > 0.1).all()


@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_parameter_learns(make_hypernetwork, head, encoder):
    """Also from a silent start, where the last factor has to move first."""
    skip_memories_without_queries(head, encoder)
    hypernetwork = make_hypernetwork(head=head, base="silent", **encoder).train().requires_grad_()
    states, mask = states_and_mask()
    x = torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.SGD(hypernetwork.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        mixed = hypernetwork(states, mask).unsqueeze(1).mix(x, torch.ones(3, 1))
        (mixed - 1).square().mean().backward()
        optimizer.step()
    assert all(parameter.grad.abs().sum() > 0 for parameter in hypernetwork.parameters())


def test_the_base_is_saved_and_not_trained(make_hypernetwork):
    hypernetwork = make_hypernetwork()
    assert {f"head.base{number}" for number in range(1, 5)} <= set(hypernetwork.state_dict())
    assert not [name for name, _ in hypernetwork.named_parameters() if "base" in name]


def test_paper_size():
    """1,082,654,848 parameters: two linear layers with bias; 8,388,608 numbers a base and an expert."""
    d, r, code = 4096, 512, 128
    paper = footprint(HypernetworkConfig.preset("paper", hidden_size=d, layer=11))
    assert paper.parameters == code * (d + 1) + 4 * r * d * (code + 1) == 1_082_654_848
    assert paper.base_numbers == 4 * r * d
    assert paper.expert_bytes == 4 * 4 * r * d == 32 * 2**20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_size(dtype):
    paper, memory = (
        footprint(HypernetworkConfig.preset(name, hidden_size=4096, layer=11), dtype) for name in ("paper", "memory")
    )
    assert memory.parameters * 100 <= paper.parameters
    assert memory.expert_bytes * 500 <= paper.expert_bytes
    assert memory.expert_bytes == 2 * 64 * 64 * dtype.itemsize


@pytest.mark.parametrize("encoder", ENCODERS)
def test_the_footprint_is_that_of_what_is_built(make_hypernetwork, head, encoder):
    skip_memories_without_queries(head, encoder)
    hypernetwork = make_hypernetwork(head=head, **encoder)
    before = torch.get_rng_state()
    size = footprint(hypernetwork.config)
    assert torch.equal(torch.get_rng_state(), before)
    assert size.parameters == sum(parameter.numel() for parameter in hypernetwork.parameters())
    assert size.parameters + size.base_numbers == sum(tensor.numel() for tensor in hypernetwork.state_dict().values())
    assert 3 * size.expert_bytes == hypernetwork(*states_and_mask()).nbytes


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("rank", 0), ("core_size", 0), ("value_size", 0), ("hidden_size", 1.5)),
        *(("layers", (-1,)), ("layers", ()), ("layers", (2, 1)), ("layers", (0, 1))),
        *(("encoder", "max"), ("base", "none"), ("head", "sparse"), ("states", "hidden")),
    ],
)
def test_wrong_configurations_are_named(field, value):
    with pytest.raises(InputError, match=field):
        HypernetworkConfig(**{"hidden_size": 32, "layers": (1,), "rank": 4, "expert_width": 16, field: value})


def test_a_memory_needs_queries():
    with pytest.raises(InputError, match="head 'memory' needs encoder 'attention'"):
        HypernetworkConfig(hidden_size=32, layers=(1,), expert_width=16, head="memory", encoder="mean")


ATTENTION = {"hidden_size": 32, "layers": (0, 2), "num_heads": 4, "num_kv_heads": 2, "head_width": 8}


def attention(**changes: object) -> HypernetworkConfig:
    return HypernetworkConfig.preset("attention", **{**ATTENTION, **changes})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(({name: None}, "needs num_heads, num_kv_heads and head_width") for name in list(ATTENTION)[2:]),
        *(({name: 0}, f"{name} is 0; it must be a positive whole number") for name in list(ATTENTION)[2:]),
        ({"num_heads": 2.0}, "num_heads is 2.0"),
        ({"num_kv_heads": 3}, "num_heads 4 is not a multiple of 3"),
        ({"kv_heads": ((0, 1),)}, r"kv_heads is \(\(0, 1\),\); it must be a list of heads for each of 2 layers"),
        ({"kv_heads": ((0, 1), (2,))}, r"kv_heads has \(2,\); it must be some of the heads 0 to 1, in ascending order"),
        ({"kv_heads": ((1, 0), (0,))}, r"kv_heads has \(1, 0\)"),
        ({"kv_heads": ((0, 0), (0,))}, r"kv_heads has \(0, 0\)"),
        ({"kv_heads": ((), (0,))}, r"kv_heads has \(\)"),
        ({"kv_heads": ((-1,), (0,))}, r"kv_heads has \(-1,\)"),
        ({"kv_heads": [["0"], [0]]}, r"kv_heads has \('0',\)"),
        ({"kv_heads": 2}, "kv_heads is 2"),
        ({"kv_heads": [0, 1]}, "kv_heads has 0"),
        ({"layers": (2, 0)}, "layers is"),
        ({"layers": (1, 1)}, "layers is"),
        ({"layers": ()}, "layers is"),
        ({"layers": 1}, "layers is"),
        ({"head": "memory"}, r"layers is \(0, 2\); head 'memory' has experts in one layer"),
        ({"head": "dense"}, r"layers is \(0, 2\); head 'dense' has experts in one layer"),
    ],
)
def test_wrong_attention_configurations_are_named_in_one_line(change, message):
    with pytest.raises(InputError, match=message) as error:
        attention(**change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kv_heads", [None, ((0,), (0, 1))])
def test_attention_configuration_round_trip(kv_heads):
    """As a dictionary, and as JSON, which has lists for tuples."""
    config = attention(kv_heads=kv_heads)
    assert (config.layers, config.layer, config.kv_heads) == ((0, 2), 0, kv_heads)
    assert HypernetworkConfig.from_dict(config.to_dict()) == config
    assert HypernetworkConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_an_older_configuration_names_its_one_layer():
    config = HypernetworkConfig.preset("memory", hidden_size=32, layer=2)
    older = {name: value for name, value in config.to_dict().items() if name != "layers"}
    assert HypernetworkConfig.from_dict({**older, "layer": 2}) == config
    with pytest.raises(InputError, match="unknown field layer"):
        HypernetworkConfig.from_dict({**config.to_dict(), "layer": 2})
    with pytest.raises(InputError, match="missing or unknown field layers"):
        HypernetworkConfig.from_dict(older)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kv_heads", "heads"), [(None, 4), (((1,), (0, 1)), 3)])
def test_attention_size(dtype, kv_heads, heads):
    """A key and a value of 8 numbers for each head kept; a number to learn for each layer and query head."""
    size = footprint(attention(kv_heads=kv_heads), dtype)
    assert size.expert_bytes == heads * 2 * 8 * dtype.itemsize
    assert (size.parameters, size.base_numbers) == (2 * 4, 0)


def test_no_attention_experts_have_the_shape_of_some_and_share_the_bias():
    hypernetwork = Hypernetwork(attention(kv_heads=((1,), (0, 1))))
    units = torch.randn(2, 5, 6, 8)
    some = hypernetwork(units, torch.ones(2, 5, dtype=torch.bool))
    none = hypernetwork.none()
    assert hypernetwork.state_shape == (6, 8) and none.units.shape == (0, 6, 8)
    assert none.bias is some.bias and none.shape == some.shape
    assert torch.equal(none.with_weights(units).units, units)


def test_attention_experts_written_into_memory_leave_out_what_is_no_token_of_theirs():
    hypernetwork = Hypernetwork(attention())
    units = torch.randn(2, 3, 8, 8)
    mask = torch.tensor([[False, True, False], [False, True, True]])
    kept = tuple(torch.full((5, 2, 8), 7.0, dtype=torch.bfloat16) for _ in range(4))
    hypernetwork.write(units, mask, kept, torch.tensor([4, 0, 3]))
    expected = torch.stack([units[1, 1], units[1, 2], units[0, 1]]).bfloat16()
    for number, part in enumerate(kept):
        assert torch.equal(part[[0, 3, 4]], expected[:, 2 * number : 2 * number + 2]) and (part[[1, 2]] == 7).all()


def test_configuration_round_trip():
    config = HypernetworkConfig(
        hidden_size=32, layers=(1,), rank=4, expert_width=16, head="factored", states="contextual"
    )
    assert HypernetworkConfig.from_dict(config.to_dict()) == config
    with pytest.raises(InputError, match="missing or unknown field expert_width"):
        HypernetworkConfig.from_dict({key: value for key, value in config.to_dict().items() if key != "expert_width"})
    with pytest.raises(InputError, match="colour"):
        HypernetworkConfig.from_dict({**config.to_dict(), "colour": 1})


def test_a_configuration_from_before_there_were_two_heads():
    older = {"hidden_size": 32, "layer": 1, "rank": 4, "expert_width": 16, "encoder": "mean", "num_queries": 8}
    older |= {"code_size": 128, "normalise": False, "head": "dense", "base": "random", "generator_gain": 1.0}
    config = HypernetworkConfig.from_dict(older)
    assert (config.head, config.states, config.rank) == ("dense", "embeddings", 4)
    assert config.layers == (older.pop("layer"),)
    assert {name: config.to_dict()[name] for name in older} == older


def test_the_paper_preset_is_the_papers_form():
    config = HypernetworkConfig.preset("paper", hidden_size=4096, layer=11)
    assert (config.rank, config.expert_width, config.code_size, config.layer) == (512, 4096, 128, 11)
    assert (config.encoder, config.states, config.normalise) == ("mean", "embeddings", False)
    assert (config.head, config.base, config.generator_gain) == ("dense", "random", 1.0)


def test_presets_take_changes_and_name_what_is_wrong():
    config = HypernetworkConfig.preset("memory", hidden_size=32, layer=1, core_size=8, states="embeddings")
    assert (config.encoder, config.head, config.base) == ("attention", "memory", "silent")
    assert (config.core_size, config.states, config.expert_width) == (8, "embeddings", 32)
    with pytest.raises(InputError, match="preset 'best' is unknown; it must be one of paper, recommended, memory"):
        HypernetworkConfig.preset("best", hidden_size=32, layer=1)
    with pytest.raises(InputError, match="colour"):
        HypernetworkConfig.preset("paper", hidden_size=32, layer=1, colour=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_written_into_memory_are_the_generated_ones(make_hypernetwork, monkeypatch, head, dtype):
    """The rows that are named, and no others."""
    monkeypatch.setattr("genpoe_plugin.experts.hypernetwork.CPU_BLOCK", 100)
    hypernetwork = make_hypernetwork(head=head, **({"encoder": "attention"} if head == "memory" else {}))
    states, mask = states_and_mask()
    # With gradients, where the dense head takes another way.
    with torch.enable_grad():
        expected = hypernetwork(states, mask)
    weights = tuple(torch.full((6, *weight.shape[1:]), 7.0, dtype=dtype) for weight in expected.weights)
    hypernetwork.write(states, mask, weights, torch.tensor([4, 0, 3]))
    for kept, weight in zip(weights, expected.weights, strict=True):
        torch.testing.assert_close(kept[[4, 0, 3]], weight.to(dtype))
        assert (kept[[1, 2, 5]] == 7).all()


def test_no_experts_have_the_shapes_of_some_and_share_what_they_share(make_hypernetwork, head):
    hypernetwork = make_hypernetwork(head=head, **({"encoder": "attention"} if head == "memory" else {}))
    none, some = hypernetwork.none(), hypernetwork(*states_and_mask())
    assert [weight.shape for weight in none.weights] == [(0, *weight.shape[1:]) for weight in some.weights]
    x, gates = torch.randn(3, 4, 32), torch.ones(3, 1)
    torch.testing.assert_close(
        none.with_weights(*(weight.unsqueeze(1) for weight in some.weights)).mix(x, gates),
        some.unsqueeze(1).mix(x, gates),
    )
