from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from genpoe_plugin.checkpoints.checkpoint import load_hypernetwork, read_record
from genpoe_plugin.errors import InputError
from genpoe_plugin.experts.config import HypernetworkConfig
from genpoe_plugin.experts.decoder import find_mlp
from genpoe_plugin.training.batches import make_batch
from genpoe_plugin.training.draws import Draw
from genpoe_plugin.training.examples import DrawnExample, TrainingExample, draw_passages
from genpoe_plugin.training.hypernetwork import HypernetworkLearner, train_hypernetwork
from genpoe_plugin.training.training_arguments import HypernetworkTraining

CONFIGURATION = HypernetworkConfig(
    hidden_size=32, layers=(1,), rank=4, expert_width=16, base="random", generator_gain=1.0
)
FACTORED = HypernetworkConfig(hidden_size=32, layers=(1,), head="factored", core_size=4, expert_width=16, base="random")
EXAMPLES = [
    TrainingExample("who wrote the opera", "Gioachino Rossini", "Rossini: Gioachino Rossini wrote an opera."),
    TrainingExample("where is it?", "Canberra", "Canberra: The capital is Canberra, founded in 1913, they say."),
    TrainingExample("what did Marie Curie discover", "radium", "Marie Curie discovered radium."),
]


DRAWS = [Draw(0, 0), Draw(0, 1), Draw(3, 2)]


def reference_losses(model, tokenizer, learner, knowledge):
    """One example at a time, no padding, all logits, one expert after another, the mask from its own tokenisation."""
    losses = []
    for draw in DRAWS:
        drawn = draw_passages(EXAMPLES, draw.example, learner.arguments.num_passages, draw.rng(0, "passages"))
        question = drawn.question[0].upper() + drawn.question[1:].rstrip("?") + "?"
        prompt = f"Question: {question}\nAnswer:"
        before = "Knowledge:\n" + "".join(f"{passage}\n" for passage in drawn.passages)
        asked = before + prompt if knowledge else prompt
        ids = tokenizer(f"{asked} {drawn.answer}\n")["input_ids"]
        length = len(tokenizer(asked)["input_ids"])
        start = len(tokenizer(before)["input_ids"]) if knowledge else 0
        experts = [alone(model, tokenizer, learner, passage) for passage in drawn.passages]

        def add(mlp, args, output, experts=experts, gates=drawn.gates, start=start):
            output = output.clone()
            for expert, gate in zip(experts, gates, strict=True):
                output[:, start:] += expert.mix(args[0], torch.full((1, 1), gate))[:, start:]
            return output

        hook = find_mlp(model, 1).register_forward_hook(add)
        logits = model(torch.tensor([ids]), use_cache=False).logits[0].double()
        hook.remove()
        targets = torch.tensor(ids[length:])
        loss = functional.cross_entropy(logits[length - 1 : -1], targets)
        if share := learner.arguments.distillation:
            taught_ids = tokenizer(f"{before}{prompt} {drawn.answer}\n")["input_ids"]
            taught = model(torch.tensor([taught_ids]), use_cache=False).logits[0, -len(targets) - 1 : -1].double()
            probabilities = taught.softmax(-1)
            divergence = (probabilities * (taught.log_softmax(-1) - logits[length - 1 : -1].log_softmax(-1))).sum(-1)
            loss = (1 - share) * loss + share * divergence.mean()
        losses.append(loss)
    return torch.stack(losses)


def alone(model, tokenizer, learner, passage):
    """The expert of one passage, ``[1, 1]``, unpadded."""
    embedded = model.get_input_embeddings()(torch.tensor([tokenizer.encode(passage)[1:]]))
    experts = learner.module(embedded, torch.ones(embedded.shape[:2], dtype=torch.bool))
    return experts[torch.zeros(1, 1, dtype=torch.long)]


@pytest.mark.parametrize("changes", [{}, {"num_passages": 3}, {"distillation": 0.3}])
@pytest.mark.parametrize("knowledge", [0.0, 1.0])
@pytest.mark.parametrize(("family", "config"), [("llama", CONFIGURATION), ("gpt_neox", FACTORED)])
def test_each_loss_is_that_of_its_example_alone(make_llm, tokenizer, family, config, knowledge, changes):
    """Each row of the batch with its own passages, which the research code did not manage."""
    model = make_llm(family)
    settings = HypernetworkTraining(knowledge=knowledge, **changes)
    learner = HypernetworkLearner(config, settings, EXAMPLES, model, tokenizer)
    losses = learner.losses(DRAWS, step=0)
    torch.testing.assert_close(
        losses.double(), reference_losses(model, tokenizer, learner, knowledge), rtol=1e-5, atol=1e-6
    )
    losses.sum().backward()
    assert all(parameter.grad is not None for parameter in learner.module.parameters())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_nothing_is_kept_of_the_layers_below_the_branch(make_llm, tokenizer):
    """What autograd keeps for the backward pass does not depend on how many layers are below, only on those above."""

    def kept(layers, layer):
        model = make_llm("llama", num_hidden_layers=layers)
        config = HypernetworkConfig(hidden_size=32, layers=(layer,), rank=4, expert_width=16)
        learner = HypernetworkLearner(config, HypernetworkTraining(), EXAMPLES, model, tokenizer)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: sizes.append(tensor.numel()), lambda _: None):
            learner.losses(DRAWS, step=0)
        return sum(sizes)

    assert kept(8, 6) == kept(3, 1) < kept(8, 1)


def test_training_learns_writes_a_checkpoint_and_leaves_the_llm_alone(make_llm, tokenizer, tmp_path):
    model = make_llm("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    training = HypernetworkTraining(epochs=40, batch_size=3, learning_rate=3e-3)
    progress = train_hypernetwork(CONFIGURATION, training, EXAMPLES, model, tokenizer, tmp_path / "out")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    losses = [loss for _, loss, _ in progress.losses]
    assert len(losses) == progress.step == 40
    assert losses[-1] < 0.5 * losses[0]
    loaded = load_hypernetwork(tmp_path / "out", model, tokenizer)
    assert loaded.config == CONFIGURATION
    assert read_record(tmp_path / "out")["training"]["arguments"]["learning_rate"] == 3e-3


def test_a_seed_repeats_a_run_exactly(make_llm, tokenizer, tmp_path):
    first, second, other = (trained(make_llm, tokenizer, tmp_path / name, seed) for name, seed in ("a1", "b1", "c2"))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert any(not torch.equal(tensor, other[name]) for name, tensor in first.items())


def trained(make_llm, tokenizer, out, seed, **changes):
    settings = {"max_steps": 4, "batch_size": 2, "knowledge": 0.5, "num_passages": 2, "seed": int(seed), **changes}
    model = make_llm("llama")
    train_hypernetwork(CONFIGURATION, HypernetworkTraining(**settings), EXAMPLES, model, tokenizer, out)
    return load_hypernetwork(out, model, tokenizer).state_dict()


@pytest.mark.parametrize("step", [1, 3])
def test_a_stopped_run_goes_on_to_the_same_weights(make_llm, tokenizer, tmp_path, monkeypatch, step):
    whole = trained(make_llm, tokenizer, tmp_path / "whole", 1)
    losses = HypernetworkLearner.losses

    def stop(self, draws, number):
        if number == step:
            raise ZeroDivisionError
        return losses(self, draws, number)

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(HypernetworkLearner, "losses", stop)
        trained(make_llm, tokenizer, tmp_path / "out", 1, save_every=2)
    again = trained(make_llm, tokenizer, tmp_path / "out", 1, save_every=2)
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())


def test_bfloat16_computes_with_less_and_learns_in_float32(make_llm, tokenizer, tmp_path):
    exact = trained(make_llm, tokenizer, tmp_path / "exact", 1)
    rough = trained(make_llm, tokenizer, tmp_path / "rough", 1, precision="bfloat16")
    assert all(tensor.dtype == torch.float32 for tensor in rough.values())
    assert any(not torch.equal(tensor, exact[name]) for name, tensor in rough.items())
    for name, tensor in rough.items():
        torch.testing.assert_close(tensor, exact[name], rtol=0.1, atol=1e-3)


@pytest.mark.parametrize("wrong", [{"num_passages": 0}, {"batch_size": 0}, {"knowledge": 1.5}, {"distillation": -0.1}])
def test_wrong_settings_are_named(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        HypernetworkTraining(**wrong)


def test_nothing_to_learn_and_a_wrong_width_write_nothing(make_llm, tokenizer, tmp_path):
    with pytest.raises(InputError, match="no training example"):
        train_hypernetwork(CONFIGURATION, HypernetworkTraining(), [], make_llm("llama"), tokenizer, tmp_path / "out")
    wide = HypernetworkConfig(hidden_size=64, layers=(1,), rank=4, expert_width=16)
    with pytest.raises(InputError, match="hidden_size is 64, the LLM's is 32"):
        train_hypernetwork(wide, HypernetworkTraining(), EXAMPLES, make_llm("llama"), tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_space_before_an_answer_is_where_the_tokenizer_puts_it():
    """Research code: by a list of four model names. This tokenizer, as Llama 2's, puts a space before every text."""
    text = "Question: Who wrote the opera?\nAnswer: Gioachino Rossini\n"
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace()
    bpe.train_from_iterator([text] * 3, trainers.BpeTrainer(special_tokens=["<unk>"], show_progress=False))
    bpe.pre_tokenizer = None
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    spaced = PreTrainedTokenizerFast(tokenizer_object=bpe)
    assert spaced.tokenize(" Gioachino Rossini\n") == ["▁", "▁Gioachino", "▁Rossini\n"], "apart, it has two spaces"
    drawn = DrawnExample("who wrote the opera", "Gioachino Rossini", (), ())
    batch = make_batch([drawn], False, spaced)
    assert batch.input_ids[0].tolist() == spaced(text)["input_ids"]
    assert spaced.convert_ids_to_tokens(batch.labels[0].tolist()) == ["▁Gioachino", "▁Rossini\n"]
