"""A trial step on fake tensors against reality: the tensors that are alive while tiny models learn."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from genpoe_plugin.errors import InputError
from genpoe_plugin.experts.config import HypernetworkConfig
from genpoe_plugin.selection.reranker_format import BGE
from genpoe_plugin.selection.reranking import Reranker
from genpoe_plugin.training.creation import attention_config
from genpoe_plugin.training.examples import TrainingExample
from genpoe_plugin.training.hypernetwork import HypernetworkLearner
from genpoe_plugin.training.memory import MemoryEstimate, NoEstimate, Trial, check_fits, fake_tensors
from genpoe_plugin.training.reranker import RerankerLearner, group_losses
from genpoe_plugin.training.reranker_data import RerankerExample
from genpoe_plugin.training.training_arguments import HypernetworkTraining, RerankerTraining
from genpoe_plugin.training.trials import HypernetworkTrial, RerankerTrial

MakeLLM = Callable[..., PreTrainedModel]
OTHERS = ("gpt_neox", "gpt2")
SIZES = {"hidden_size": 64, "num_hidden_layers": 4}
WIDTHS = {
    "gpt_neox": {"intermediate_size": 256},
    "gpt2": {"n_inner": 256, "resid_pdrop": 0, "attn_pdrop": 0, "embd_pdrop": 0},
}


class Alive(TorchDispatchMode):
    """The bytes of all tensors that are alive, those given and those made inside the block, and the most there were."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.most = 0
        self.storages: dict[int, weakref.ref[Any]] = {}
        for tensor in tensors:
            self.count(tensor)

    def count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()

        def gone(_: object) -> None:
            self.now -= size
            del self.storages[key]

        if key not in self.storages:
            self.storages[key] = weakref.ref(storage, gone)
            self.now += size
            self.most = max(self.most, self.now)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.count(tensor)
        return result


def nbytes(found: Iterable[Tensor | None]) -> int:
    return sum(tensor.nbytes for tensor in found if tensor is not None)


def make_sized(
    make_llm: MakeLLM, family: str, dtype: torch.dtype = torch.float32, **changes: object
) -> PreTrainedModel:
    width = WIDTHS.get(family, {"intermediate_size": 160})
    return make_llm(family, **{**SIZES, **width, **changes}).to(dtype)


def on_meta(model: PreTrainedModel) -> PreTrainedModel:
    """The same without weights; tied ones stay tied."""
    with torch.device("meta"):
        return type(model)(model.config).to(model.dtype)


class Run:
    """A real training step on a trial's longest batch, in which one row is shorter."""

    def __init__(self, trial: Any, model: PreTrainedModel, tokenizer: Any) -> None:
        self.trial, self.model = trial, model
        if isinstance(trial, RerankerTrial):
            reranker = Reranker(model, tokenizer, prompt=trial.examples[0].prompt, max_length=trial.max_length)
            self.module = RerankerLearner(reranker, trial.arguments, trial.examples).module.train()
            group = trial.longest_group()
            pairs = [("who", "short"), *(group * trial.rows)[1:]]
            self.losses = lambda: group_losses(reranker.score_rows(reranker.encode(pairs)), [len(group)] * trial.rows)
        else:
            learner = HypernetworkLearner(trial.config, trial.arguments, trial.examples, model, tokenizer)
            self.module = learner.module
            drawn = trial.longest_batch()
            if len(drawn) > 1:
                drawn[0] = replace(drawn[0], question="who", passages=("who", *drawn[0].passages[1:]))
            self.losses = lambda: learner.losses_of(drawn, trial.arguments.knowledge > 0)
        self.learning = [weight for weight in self.module.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(self.learning)

    def backward(self) -> None:
        bfloat16 = self.trial.arguments.precision == "bfloat16"
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
            loss = self.losses().mean()
        loss.backward()

    @property
    def moments(self) -> list[Tensor]:
        return [value for state in self.optimizer.state.values() for value in state.values()]

    def most_alive(self) -> int:
        """Bytes at the worst moment of a whole step, the first step's lasting results being there already."""
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        owners: list[nn.Module] = [self.model, self.module]
        with Alive([tensor for owner in owners for tensor in (*owner.parameters(), *owner.buffers())]) as alive:
            for moment in self.moments:
                alive.count(moment)
            self.backward()
            self.optimizer.step()
        return alive.most


def words(count: int) -> str:
    return " ".join(["who"] * count)


def hypernetwork_run(model: PreTrainedModel, tokenizer: Any, **changes: Any) -> Run:
    """Sizes are words of texts; the other changes are of the form or of the training."""
    sizes = {"question": 30, "answer": 3, "passage": 40, "num_passages": 2, "batch_size": 6}
    sizes |= {name: changes.pop(name) for name in sizes if name in changes}
    form: dict[str, Any] = {"head": "dense", "states": "embeddings", "layer": 0, "rank": 4, "core_size": 8}
    form |= {"expert_width": 32, "code_size": 16, "num_queries": 8, "hidden_size": model.config.hidden_size}
    form |= {name: changes.pop(name) for name in form if name in changes}
    config = changes.pop("config", None) or HypernetworkConfig.from_dict(form)
    training = {name: sizes[name] for name in ("num_passages", "batch_size")}
    examples = [
        TrainingExample(words(sizes["question"]), words(sizes["answer"]), f"{number} {words(sizes['passage'])}")
        for number in range(sizes["num_passages"] * sizes["batch_size"])
    ]
    trial = HypernetworkTrial(
        config=config,
        arguments=HypernetworkTraining(**training, **changes),
        examples=examples,
        model=on_meta(model),
        tokenizer=tokenizer,
        llm_bytes=nbytes(model.parameters()),
        device=torch.device("cpu"),
    )
    return Run(trial, model, tokenizer)


def reranker_run(model: PreTrainedModel, tokenizer: Any, rank: int, **changes: Any) -> Run:
    examples = [RerankerExample(words(8), (words(40),), (words(39),) * 3, "Well?")]
    trial = RerankerTrial(
        arguments=RerankerTraining(batch_size=2, micro_batch_size=2, lora_rank=rank, **changes),
        examples=examples,
        model=on_meta(model),
        tokenizer=tokenizer,
        format=BGE,
        prompt=examples[0].prompt,
        max_length=512,
        llm_bytes=nbytes(model.parameters()),
        device=torch.device("cpu"),
    )
    return Run(trial, model, tokenizer)


@pytest.mark.parametrize("family", ["gemma", "gpt2"])
def test_what_a_hypernetworks_training_holds_is_exact(make_llm: MakeLLM, tokenizer: Any, family: str) -> None:
    run = hypernetwork_run(make_sized(make_llm, family), tokenizer)
    run.backward()
    run.optimizer.step()
    part = run.trial.measure().parts
    assert part["LLM weights"] == nbytes(run.model.parameters())
    assert part["weights that learn"] == nbytes(run.learning)
    assert part["buffers"] == nbytes((*run.module.buffers(), *run.model.buffers()))
    assert part["gradients"] == nbytes(weight.grad for weight in run.learning)
    assert part["AdamW's moments"] == nbytes(run.moments)


@pytest.mark.parametrize("rank", [4, 0])
@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_what_a_rerankers_training_holds_is_exact(make_llm: MakeLLM, tokenizer: Any, family: str, rank: int) -> None:
    model = make_sized(make_llm, family, head_dim=24) if family == "qwen3" else make_sized(make_llm, family)
    run = reranker_run(model, tokenizer, rank)
    run.backward()
    run.optimizer.step()
    part = run.trial.measure().parts
    assert part["weights that learn"] == part["gradients"] == nbytes(run.learning)
    assert part["AdamW's moments"] == nbytes(run.moments)
    assert part["LLM weights"] + part["weights that learn"] == nbytes(run.module.parameters())


MEMORY = {"head": "memory", "core_size": 16, "num_queries": 32, "states": "contextual"}
TEACHER = {"distillation": 0.5, "unanswerable": 0.5}
SETTINGS: list[dict[str, Any]] = [
    {"rank": 32, "expert_width": 64, "code_size": 64, "batch_size": 1},  # the optimizer's step is the worst moment
    {"rank": 32, "expert_width": 64, "batch_size": 16, "question": 2},  # experts outweigh activations
    {"answer": 30, "num_passages": 1, "vocab_size": 4000, "precision": "bfloat16"},  # predictions do
    {"layer": 3, "rank": 2, "expert_width": 800, "batch_size": 2, "question": 250, "passage": 5},  # the branch does
    {"knowledge": 0.5, "dtype": torch.bfloat16},
    {**MEMORY, "layer": 3, "question": 4, "passage": 120},  # the LLM reading passages is the worst moment
    {**MEMORY, "layer": 3, "question": 4, "passage": 250, "states": "embeddings"},  # normalising their states is
    {**MEMORY, **TEACHER, "precision": "bfloat16"},  # the teacher reading is the worst moment
    {**MEMORY, **TEACHER, "passage": 10, "answer": 30, "vocab_size": 4000},  # the divergence is
]


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: "-".join(setting) or "plain")
def test_a_hypernetworks_step_takes_what_was_estimated(
    make_llm: MakeLLM, tokenizer: Any, setting: dict[str, Any]
) -> None:
    model_setting = {name: setting[name] for name in ("dtype", "vocab_size") if name in setting}
    training = {name: value for name, value in setting.items() if name not in model_setting}
    run = hypernetwork_run(make_sized(make_llm, "llama", **model_setting), tokenizer, **training)
    assert 0.95 < run.trial.measure().total / run.most_alive() < 1.05


@pytest.mark.parametrize(("window", "precision"), [(1, "bfloat16"), (4, "float32")])
def test_a_step_with_experts_in_the_attention(make_llm: MakeLLM, tokenizer: Any, precision: str, window: int) -> None:
    model = make_sized(make_llm, "llama")
    config = replace(attention_config(model, (0, 2)), addition_rank=4, window=window)
    run = hypernetwork_run(model, tokenizer, config=config, precision=precision)
    assert 0.95 < run.trial.measure().total / run.most_alive() < 1.05


@pytest.mark.parametrize("family", OTHERS)
def test_a_step_of_other_families(make_llm: MakeLLM, tokenizer: Any, family: str) -> None:
    run = hypernetwork_run(make_sized(make_llm, family), tokenizer)
    assert 0.95 < run.trial.measure().total / run.most_alive() < 1.05
    for checkpointing in (False, True):
        run = reranker_run(make_sized(make_llm, family), tokenizer, 4, gradient_checkpointing=checkpointing)
        assert 0.95 < run.trial.measure().total / run.most_alive() < 1.05


@pytest.mark.parametrize(("checkpointing", "precision"), [(False, "float32"), (True, "bfloat16")])
@pytest.mark.parametrize(("rank", "dtype"), [(4, torch.bfloat16), (0, torch.float32)])
def test_a_rerankers_step_takes_what_was_estimated(
    make_llm: MakeLLM, tokenizer: Any, rank: int, dtype: torch.dtype, checkpointing: bool, precision: str
) -> None:
    model = make_sized(make_llm, "llama", dtype)
    run = reranker_run(model, tokenizer, rank, gradient_checkpointing=checkpointing, precision=precision)
    assert 0.95 < run.trial.measure().total / run.most_alive() < 1.05


def test_gradients_of_earlier_passes_are_there(make_llm: MakeLLM, tokenizer: Any) -> None:
    model = make_sized(make_llm, "llama")
    alone = hypernetwork_run(model, tokenizer, batch_size=2).trial
    first = replace(alone, arguments=replace(alone.arguments, batch_size=4, micro_batch_size=2))
    gradients = alone.measure().parts["gradients"]
    assert first.measure().total == alone.measure().total + gradients


def test_paper_size(tokenizer: Any) -> None:
    """1.08 B parameters, 4.0 GiB in float32, 16 GiB with gradients and Adam; an expert is 32 MiB."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=32000)).bfloat16()
    llm_bytes = nbytes(model.parameters())
    assert llm_bytes == 6_738_415_616 * 2
    trial = HypernetworkTrial(
        config=HypernetworkConfig.preset("paper", hidden_size=4096, layer=11),
        arguments=HypernetworkTraining(),
        examples=[TrainingExample("who is it", "Marie Curie", f"{n} discovered radium") for n in range(16)],
        model=model,
        tokenizer=tokenizer,
        llm_bytes=llm_bytes,
        device=torch.device("cpu"),
    )
    alone, shared = trial.measure().parts, replace(trial, shards=4).measure().parts
    gib = {name: size / 2**30 for name, size in alone.items()}
    assert gib["weights that learn"] == pytest.approx(4.0, abs=0.05)
    held = gib["weights that learn"] + gib["gradients"] + gib["AdamW's moments"]
    assert held == pytest.approx(16, abs=0.2)
    assert alone["LLM weights"] == llm_bytes
    assert gib["activations and intermediate results"] > 2 * 16 / 32, "experts of the batch and their gradients"
    for name in ("weights that learn", "gradients", "AdamW's moments"):
        assert shared[name] == pytest.approx(alone[name] / 4, abs=1)
    assert shared["LLM weights"] == alone["LLM weights"]
    assert shared["unsharded for the pass"] == 2 * alone["weights that learn"]


def test_an_llm_that_depends_on_values_has_no_estimate() -> None:
    layer = nn.Linear(2, 2, device="meta")
    with (
        pytest.raises(NoEstimate, match="cannot run on fake tensors") as error,
        fake_tensors(layer, device=torch.device("cpu")),
    ):
        layer(torch.ones(1, 2)).sum().item()
    assert "\n" not in str(error.value)


def advice(trial: Trial, available: int) -> list[str]:
    with pytest.raises(InputError) as error:
        check_fits(trial, trial.measure(), available)
    message = str(error.value)
    assert "\n" not in message
    assert "it fits with " in message
    return message.split("it fits with ")[1].split(", or with ")


def changes(trial: Trial) -> dict[str, Any]:
    """The changes that are tried, of which the last of a group goes furthest, and their trials."""
    return {text: changed for group in trial.smaller() for text, changed in group}


def test_advice_on_a_hypernetwork_helps(make_llm: MakeLLM, tokenizer: Any) -> None:
    model = make_sized(make_llm, "llama", num_hidden_layers=2)
    trial = hypernetwork_run(model, tokenizer, **MEMORY, **TEACHER, batch_size=8).trial
    tried = changes(trial)
    sharded = [f"sharding over {shards} devices" for shards in (4, 8)]
    assert [*tried] == [
        *("micro_batch_size=2", "micro_batch_size=1", "precision=bfloat16", "an LLM in bfloat16", "states=embeddings"),
        *("distillation=0 and unanswerable=0", *sharded),
    ]
    assert (tried["micro_batch_size=2"].rows, tried["states=embeddings"].config.states) == (2, "embeddings")
    total = trial.measure().total
    for text in ("micro_batch_size=2", "precision=bfloat16", "an LLM in bfloat16", "distillation=0 and unanswerable=0"):
        assert tried[text].measure().total < total


def test_sharding_helps_where_what_learns_outweighs_the_llm(make_llm: MakeLLM, tokenizer: Any) -> None:
    model = make_sized(make_llm, "llama", num_hidden_layers=2)
    trial = hypernetwork_run(model, tokenizer, rank=256, batch_size=1, num_passages=1).trial
    assert "sharding over 4 devices" in advice(trial, int(0.9 * trial.measure().total))


def test_advice_on_a_reranker_helps(make_llm: MakeLLM, tokenizer: Any) -> None:
    trial = reranker_run(make_sized(make_llm, "llama", num_hidden_layers=2), tokenizer, 4).trial
    total = trial.measure().total
    tried = changes(trial)
    assert [*tried] == [
        *("micro_batch_size=1", "precision=bfloat16", "gradient checkpointing", "an LLM in bfloat16"),
    ]
    assert all(changed.measure().total < total for changed in tried.values())
    full = reranker_run(make_sized(make_llm, "llama", vocab_size=40000), tokenizer, 0).trial
    adapted = changes(full)["a LoRA adapter in the place of all weights"]
    assert adapted.measure().total < full.measure().total / 2


@dataclass
class Fixed:
    """A trial whose sizes are known."""

    size: int
    changes: tuple[tuple[tuple[str, Trial], ...], ...] = ()

    def measure(self) -> MemoryEstimate:
        return MemoryEstimate({"LLM weights": self.size})

    def smaller(self) -> Iterator[Iterable[tuple[str, Trial]]]:
        return iter(self.changes)


def test_where_no_single_change_is_enough() -> None:
    trial = Fixed(10, ((("a=2", Fixed(8)), ("a=1", Fixed(6))), (("b=1", Fixed(10)),), (("c=1", Fixed(7)),)))
    check_fits(trial, trial.measure(), 10)
    assert advice(trial, 9) == ["a=2", "c=1"]
    assert advice(trial, 6) == ["a=1"]
    with pytest.raises(
        InputError, match=r"no change alone is enough, but these help: a=1 \(then 6 B\), c=1 \(then 7 B\)"
    ):
        check_fits(trial, trial.measure(), 5)
    with pytest.raises(InputError, match="a larger device"):
        check_fits(Fixed(10), MemoryEstimate({"LLM weights": 10}), 9)


def test_the_table_names_every_part_and_the_total() -> None:
    estimate = MemoryEstimate({"weights": 3 << 30, "activations": 3 << 19, "results": 5 << 10, "none": 0})
    assert estimate.total == (3 << 30) + (3 << 19) + (5 << 10)
    lines = [re.split(r"  +", line.strip()) for line in estimate.table().splitlines()]
    assert [line for line in lines if len(line) > 1] == [
        ["weights", "3.0 GiB"],
        ["activations", "1.5 MiB"],
        ["results", "5.0 KiB"],
        ["at most, at the same time", "3.0 GiB"],
    ]
