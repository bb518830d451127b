"""Training the hypernetwork against a straightforward implementation of the research code's loop.

The baseline, `paper_loop`, processes one example at a time in float32, with the whole LLM in the graph, logits of every
position, and an optimizer step per example. Ours processes the same examples in batches of 16, with gradients only for
the branch and the layers above it. Speed is compared with the same form and LLM; peak memory is compared between the
baseline and the memory form. Experts in the attention are trained with passage states cached from the previous epoch,
and without the cache.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.evaluation import reading_layers
from benchmarks.memory import peak_bytes, tensors_of
from benchmarks.options import Options
from benchmarks.random_llm import random_llm, random_text
from benchmarks.rates import seconds
from benchmarks.row import Row
from genpoe_plugin.experts.config import HypernetworkConfig
from genpoe_plugin.experts.hypernetwork import Hypernetwork
from genpoe_plugin.prompts import closed_book_prompt
from genpoe_plugin.training.creation import attention_config
from genpoe_plugin.training.draws import Draw
from genpoe_plugin.training.examples import TrainingExample
from genpoe_plugin.training.hypernetwork import HypernetworkLearner
from genpoe_plugin.training.training_arguments import HypernetworkTraining

WIDTH, LAYERS, LAYER, RANK, BATCH, WORDS = 768, 12, 4, 128, 16, 100
REPEATS = 3


def language_model() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A random Llama of about 100 million parameters and a tokenizer with one token per word."""
    return random_llm(WIDTH, LAYERS)


def training_set(count: int) -> list[TrainingExample]:
    """Questions of ten words, answers of three, passages of a hundred."""
    rng = random.Random(0)
    return [TrainingExample(random_text(rng, 10), random_text(rng, 3), random_text(rng, WORDS)) for _ in range(count)]


def paper_loop(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    hypernetwork: Hypernetwork,
    optimizer: torch.optim.Optimizer,
    examples: Sequence[TrainingExample],
) -> None:
    """The training loop of the research code: one optimizer step per example."""
    embed = model.get_input_embeddings()
    for example in examples:
        passage = torch.tensor([tokenizer.encode(example.passage)])
        w1, w2, w3, w4 = hypernetwork(embed(passage), torch.ones_like(passage)).weights
        prompt = tokenizer.encode(closed_book_prompt(example.question))
        answer = tokenizer.encode(f" {example.answer}\n")

        def add(_: nn.Module, args: Any, output: Tensor, w1=w1, w2=w2, w3=w3, w4=w4) -> Tensor:
            return output + torch.relu(args[0] @ w1.mT @ w2.mT) @ w3.mT @ w4.mT

        hook = model.model.layers[LAYER].mlp.register_forward_hook(add)
        # The input of the lowest layer requires a gradient, so the graph covers the whole LLM.
        logits = model(inputs_embeds=embed(torch.tensor([prompt + answer])).detach().requires_grad_()).logits
        hook.remove()
        loss = functional.cross_entropy(logits[0, len(prompt) - 1 : -1], torch.tensor(answer))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def our_step(
    learner: HypernetworkLearner, optimizer: torch.optim.Optimizer, examples: Sequence[TrainingExample]
) -> None:
    """One optimizer step over the same examples as one batch."""
    loss = learner.losses([Draw(0, number) for number in range(len(examples))], step=0).mean()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def measure(options: Options) -> list[Row]:
    """Time and peak memory of a step of 16 examples, ours against the baseline."""
    model, tokenizer = language_model()
    examples = training_set(BATCH)
    paper = HypernetworkConfig.preset("paper", hidden_size=WIDTH, layer=LAYER, rank=RANK)
    memory = HypernetworkConfig.preset("memory", hidden_size=WIDTH, layer=LAYER)
    torch.manual_seed(0)
    theirs = Hypernetwork(paper)
    their_optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-4)
    attention = replace(attention_config(model, reading_layers(LAYERS)), addition_rank=64, window=4)
    learners = {
        name: HypernetworkLearner(
            form, HypernetworkTraining(batch_size=BATCH, epochs=epochs), examples, model, tokenizer
        )
        for name, form, epochs in (
            ("paper", paper, 1),
            ("memory", memory, 1),
            ("attention", attention, 1),
            ("attention_kept", attention, 2),
        )
    }
    optimizers = {name: torch.optim.AdamW(learner.module.parameters(), lr=1e-4) for name, learner in learners.items()}
    variants: dict[str, Callable[[], None]] = {
        "loop": lambda: paper_loop(model, tokenizer, theirs, their_optimizer, examples),
        **{name: lambda name=name: our_step(learners[name], optimizers[name], examples) for name in learners},
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in tqdm(range(1 + (1 if options.quick else REPEATS)), desc="Timing"):
        for name, run in variants.items():
            taken = seconds(run)
            if repeat:  # the first round is warm-up
                times[name].append(taken)
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    frozen = tensors_of(model)
    parts = {"loop": (theirs, their_optimizer)}
    parts |= {name: (learner.module, optimizers[name]) for name, learner in learners.items()}
    peaks = {name: peak_bytes(variants[name], frozen + tensors_of(*parts[name])) for name in variants}
    return [
        Row("training.loop_examples_per_second", BATCH / medians["loop"], "examples/s"),
        Row("training.examples_per_second_ratio", medians["loop"] / medians["paper"], "x", ">= 3"),
        Row("training.memory_examples_per_second_ratio", medians["loop"] / medians["memory"], "x"),
        Row("training.attention_examples_per_second", BATCH / medians["attention"], "examples/s"),
        Row("training.kept_states_speedup", medians["attention"] / medians["attention_kept"], "x", ">= 2"),
        Row("training.loop_peak_memory", peaks["loop"] / 2**20, "MiB"),
        Row("training.paper_peak_memory_ratio", peaks["paper"] / peaks["loop"], "x"),
        Row("training.peak_memory_ratio", peaks["memory"] / peaks["loop"], "x", "<= 0.5"),
    ]
