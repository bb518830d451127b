from __future__ import annotations

import numpy as np
import pytest
import torch

from genpoe_plugin.errors import InputError
from genpoe_plugin.experts.config import HypernetworkConfig
from genpoe_plugin.experts.hypernetwork import Hypernetwork


def states_and_mask(lengths=(5, 2, 7), width=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(len(lengths), max(lengths), width, generator=generator)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    return states, mask


def rms(x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + np.finfo(np.float32).eps)


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
            weights = np.exp(tokens @ query)
            found.append((weights / weights.sum()) @ tokens)
        pooled = np.concatenate(found)
    linear = encoder.project
    return np.maximum(linear.weight.double().numpy() @ pooled + linear.bias.double().numpy(), 0)


@pytest.mark.parametrize("encoder", ["mean", "attention"])
@pytest.mark.parametrize("normalise", [True, False])
def test_experts_equal_the_definition(make_hypernetwork, encoder, normalise):
    hypernetwork = make_hypernetwork(encoder=encoder, normalise=normalise)
    states, mask = states_and_mask()
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


@pytest.mark.parametrize("encoder", ["mean", "attention"])
def test_padding_does_not_matter(make_hypernetwork, encoder):
    hypernetwork = make_hypernetwork(encoder=encoder)
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


def test_the_base_is_saved_and_not_trained(make_hypernetwork):
    hypernetwork = make_hypernetwork()
    assert {f"head.base{number}" for number in range(1, 5)} <= set(hypernetwork.state_dict())
    assert not [name for name, _ in hypernetwork.named_parameters() if "base" in name]


def test_paper_size():
    with torch.device("meta"):
        paper = Hypernetwork(
            HypernetworkConfig(hidden_size=4096, layer=11, rank=512, expert_width=4096, encoder="mean")
        )
    assert round(sum(parameter.numel() for parameter in paper.parameters()) / 1e9, 2) == 1.08


@pytest.mark.parametrize(
    ("field", "value"), [("rank", 0), ("layer", -1), ("encoder", "max"), ("base", "none"), ("hidden_size", 1.5)]
)
def test_wrong_configurations_are_named(field, value):
    with pytest.raises(InputError, match=field):
        HypernetworkConfig(**{"hidden_size": 32, "layer": 1, "rank": 4, "expert_width": 16, field: value})


def test_configuration_round_trip():
    config = HypernetworkConfig(hidden_size=32, layer=1, rank=4, expert_width=16)
    assert HypernetworkConfig.from_dict(config.to_dict()) == config
    with pytest.raises(InputError, match="rank"):
        HypernetworkConfig.from_dict({key: value for key, value in config.to_dict().items() if key != "rank"})
    with pytest.raises(InputError, match="colour"):
        HypernetworkConfig.from_dict({**config.to_dict(), "colour": 1})
