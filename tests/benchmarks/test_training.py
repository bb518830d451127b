"""The training benchmark: its baseline computes the same update, and peak memory is counted correctly."""

from __future__ import annotations

import pytest
import torch

from benchmarks import training
from benchmarks.memory import peak_bytes, tensors_of
from genpoe_plugin.experts.config import HypernetworkConfig
from genpoe_plugin.experts.hypernetwork import Hypernetwork
from genpoe_plugin.training.hypernetwork import HypernetworkLearner
from genpoe_plugin.training.training_arguments import HypernetworkTraining


@pytest.fixture
def small(monkeypatch):
    for name, value in {"WIDTH": 64, "LAYERS": 3, "LAYER": 1, "RANK": 4, "WORDS": 12}.items():
        monkeypatch.setattr(training, name, value)
    return HypernetworkConfig.preset("paper", hidden_size=64, layer=1, rank=4)


def test_the_baseline_updates_the_weights_as_ours(small):
    model, tokenizer = training.language_model()
    examples = training.training_set(1)
    learner = HypernetworkLearner(small, HypernetworkTraining(), examples, model, tokenizer)
    theirs = Hypernetwork(small)
    theirs.load_state_dict(learner.module.state_dict())
    before = {name: weight.clone() for name, weight in theirs.named_parameters()}
    training.paper_loop(model, tokenizer, theirs, torch.optim.SGD(theirs.parameters(), lr=1e3), examples)
    training.our_step(learner, torch.optim.SGD(learner.module.parameters(), lr=1e3), examples)
    for name, weight in learner.module.named_parameters():
        torch.testing.assert_close(dict(theirs.named_parameters())[name], weight, rtol=1e-3, atol=1e-5)
        assert not torch.equal(weight, before[name])


def test_the_peak_counts_live_tensors():
    def work():
        first = torch.zeros(1000, 1000)
        second = first + 1
        view = second.T
        del first, second
        torch.zeros(500, 1000)
        del view

    assert peak_bytes(work) == 8_000_000
    assert peak_bytes(work, [torch.zeros(1000)]) == 8_004_000


def test_the_peak_of_a_step_has_weights_gradients_moments_and_activations():
    layer = torch.nn.Linear(1000, 1000, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    inputs = torch.ones(500, 1000)

    def step():
        loss = layer(inputs).relu().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    step()
    weights, activations = 4_000_000, 2_000_000
    peak = peak_bytes(step, [*tensors_of(layer, optimizer), inputs])
    # Weights, momentum, gradient and the inputs, with the two activations and their gradients at the end of the pass.
    assert 3 * weights + 2 * activations <= peak <= 3 * weights + 6 * activations
