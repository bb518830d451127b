from __future__ import annotations

import csv
import json

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from genpoe_plugin.checkpoint import CONFIG, load_hypernetwork
from genpoe_plugin.errors import InputError
from genpoe_plugin.experts.config import HypernetworkConfig
from genpoe_plugin.experts.generator import ExpertGenerator
from genpoe_plugin.experts.hypernetwork import Hypernetwork
from genpoe_plugin.experts.injection import RowExperts, inject
from genpoe_plugin.passages import Passage
from genpoe_plugin.questions import Question, RetrievedPassage
from genpoe_plugin.training.hypernetwork import (
    HypernetworkTraining,
    TrainingExample,
    answer_loss,
    learning_rate_at,
    make_batch,
    train_hypernetwork,
    training_examples,
)

CONFIGURATION = HypernetworkConfig(hidden_size=32, layer=1, rank=4, expert_width=16, base="random", generator_gain=1.0)
EXAMPLES = [
    TrainingExample("who wrote the opera", "Gioachino Rossini", "Rossini: Gioachino Rossini wrote an opera."),
    TrainingExample("where is it?", "Canberra", "Canberra: The capital is Canberra, founded in 1913, they say."),
    TrainingExample("what did Marie Curie discover", "radium", "Marie Curie discovered radium."),
]


def reference_loss(model, tokenizer, hypernetwork, examples, knowledge):
    """One example at a time, no padding, all logits, the mask from the string's own tokenisation."""
    losses = []
    for example in examples:
        question = example.question[0].upper() + example.question[1:].rstrip("?") + "?"
        prompt = f"Question: {question}\nAnswer:"
        before = f"Knowledge:\n{example.passage}\n" if knowledge else ""
        ids = tokenizer(f"{before}{prompt} {example.answer}\n")["input_ids"]
        length = len(tokenizer(before + prompt)["input_ids"])
        start = len(tokenizer(before)["input_ids"]) if knowledge else 0
        embedded = model.get_input_embeddings()(torch.tensor([tokenizer.encode(example.passage)[1:]]))
        experts = hypernetwork(embedded, torch.ones(embedded.shape[:2], dtype=torch.bool))
        with inject(model, 1, RowExperts(experts.unsqueeze(1), torch.ones(1, 1), torch.tensor([start]))):
            logits = model(torch.tensor([ids]), use_cache=False).logits[0]
        losses.append(functional.cross_entropy(logits[length - 1 : -1].double(), torch.tensor(ids[length:])))
    return torch.stack(losses).mean().item()


@pytest.mark.parametrize("knowledge", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_the_loss_is_the_mean_over_examples_of_the_mean_over_answer_tokens(make_llm, tokenizer, family, knowledge):
    """Each row of the batch with its own passage, which the research code did not manage."""
    model = make_llm(family).requires_grad_(False)
    torch.manual_seed(0)
    hypernetwork = Hypernetwork(CONFIGURATION)
    generator = ExpertGenerator(hypernetwork, model, tokenizer)
    loss = answer_loss(model, generator, make_batch(EXAMPLES, knowledge, tokenizer)).item()
    assert loss == pytest.approx(reference_loss(model, tokenizer, hypernetwork, EXAMPLES, knowledge), rel=1e-5)


def test_training_learns_writes_a_checkpoint_and_leaves_the_llm_alone(make_llm, tokenizer, tmp_path):
    model = make_llm("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    training = HypernetworkTraining(epochs=40, batch_size=3, learning_rate=3e-3, warmup_steps=5)
    trained = train_hypernetwork(CONFIGURATION, training, EXAMPLES, model, tokenizer, tmp_path / "out")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with (tmp_path / "out" / "loss.csv").open() as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert len(losses) == 40
    assert losses[-1] < 0.5 * losses[0]
    loaded = load_hypernetwork(tmp_path / "out", model, tokenizer)
    assert all(torch.equal(tensor, trained.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["training"]["steps"] == 40


def test_a_seed_repeats_a_run_exactly(make_llm, tokenizer, tmp_path):
    training = HypernetworkTraining(max_steps=4, epochs=9, batch_size=2, knowledge=0.5)
    first, second, other = (
        train_hypernetwork(
            CONFIGURATION,
            HypernetworkTraining(**{**vars(training), "seed": seed}),
            EXAMPLES,
            make_llm("llama"),
            tokenizer,
            tmp_path / name,
        ).state_dict()
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert any(not torch.equal(tensor, other[name]) for name, tensor in first.items())


def test_examples_take_the_best_passage_with_an_answer_and_the_form_it_uses():
    def retrieved(text, **facts):
        return RetrievedPassage(Passage("1", "Title", text), 1.0, 1, **facts)

    question = Question("Who?", ("a physician", "doctor"), (retrieved("No one."), retrieved("He was a doctor.")))
    assert training_examples([question]) == [TrainingExample("Who?", "doctor", "Title: He was a doctor.")]
    marked = Question("Who?", ("doctor",), (retrieved("Another doctor.", has_answer=False),))
    assert training_examples([marked, Question("Who?", ("doctor",))]) == []


def test_the_rate_warms_up_and_falls_to_a_hundredth():
    training = HypernetworkTraining(learning_rate=1.0, warmup_steps=10)
    rates = [learning_rate_at(step, 100, training) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates[100] == pytest.approx(0.01)
    assert rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.parametrize(
    "wrong", [{"epochs": 0}, {"max_steps": 0}, {"batch_size": 0}, {"knowledge": 1.5}, {"learning_rate": 0.0}]
)
def test_wrong_settings_are_named(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        HypernetworkTraining(**wrong)


def test_nothing_to_learn_and_a_wrong_width_write_nothing(make_llm, tokenizer, tmp_path):
    with pytest.raises(InputError, match="no training example"):
        train_hypernetwork(CONFIGURATION, HypernetworkTraining(), [], make_llm("llama"), tokenizer, tmp_path / "out")
    wide = HypernetworkConfig(hidden_size=64, layer=1, rank=4, expert_width=16)
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
    batch = make_batch(EXAMPLES[:1], False, spaced)
    assert batch.input_ids[0].tolist() == spaced(text)["input_ids"]
    assert spaced.convert_ids_to_tokens(batch.labels[0].tolist()) == ["▁Gioachino", "▁Rossini\n"]
