"""Training the reranker: its loss by hand, its draws, what it learns, what it writes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from genpoe_plugin.errors import InputError
from genpoe_plugin.selection.reranking import Reranker
from genpoe_plugin.training.draws import Draw, batch_at
from genpoe_plugin.training.reranker import (
    RerankerLearner,
    attention_projections,
    draw_group,
    group_losses,
    positive_ranks,
    ranking_quality,
    train_reranker,
)
from genpoe_plugin.training.reranker_data import RerankerExample, read_examples
from genpoe_plugin.training.training_arguments import RerankerTraining

MakeData = Callable[..., Path]
EXAMPLE = RerankerExample("q", ("p1", "p2"), ("n1", "n2", "n3", "n4"))


@dataclass(frozen=True)
class Setup:
    """A short training on the toy task."""

    model: Path
    data: Path
    out: Path

    def arguments(self, **changes: Any) -> RerankerTraining:
        settings: dict[str, Any] = {
            "negatives": 4,
            "batch_size": 4,
            "micro_batch_size": 4,
            "max_steps": 3,
            "learning_rate": 1e-3,
            "lora_rank": 4,
        }
        return RerankerTraining(**{**settings, **changes})

    def start(self, max_length: int = 512) -> Reranker:
        return Reranker.load(self.model, format="bge", prompt=read_examples(self.data)[0].prompt, max_length=max_length)

    def losses(self, held_out: Path | None = None, out: Path | None = None, **changes: Any) -> list[float]:
        progress = train_reranker(
            self.start(),
            self.arguments(**changes),
            read_examples(self.data),
            out or self.out,
            held_out=read_examples(held_out) if held_out else [],
        )
        return [loss for _, loss, _ in progress.losses]

    def trained(self, **changes: Any) -> Reranker:
        self.losses(**changes)
        return Reranker.load(changes.get("out", self.out))


@pytest.fixture
def setup(llm_dir: Path, make_reranker_data: MakeData, tmp_path: Path) -> Setup:
    return Setup(llm_dir, make_reranker_data(tmp_path / "train.jsonl", 64, seed=0), tmp_path / "out")


def test_group_losses_are_cross_entropies() -> None:
    scores = torch.tensor([1.0, 2.0, -1.0, 0.5, 3.0])
    by_hand = [
        -math.log(math.exp(group[0]) / sum(math.exp(score) for score in group))
        for group in ([1.0, 2.0, -1.0], [0.5, 3.0])
    ]
    assert group_losses(scores, [3, 2]).tolist() == pytest.approx(by_hand, abs=1e-6)


def test_group_losses_have_finite_gradients_for_unequal_groups() -> None:
    scores = torch.tensor([1.0, 2.0, -1.0, 0.5, 3.0], requires_grad=True)
    group_losses(scores, [3, 2]).sum().backward()
    softmax = torch.cat([scores[:3].softmax(0), scores[3:].softmax(0)])
    torch.testing.assert_close(scores.grad, softmax - torch.tensor([1.0, 0, 0, 1.0, 0]))


def test_groups_are_decided_by_seed_epoch_and_example() -> None:
    draws = [Draw(epoch, example) for epoch in range(8) for example in range(5)]
    groups = [draw_group(EXAMPLE, 2, draw, 0) for draw in draws]
    for draw, group in zip(draws, groups, strict=True):
        assert group == draw_group(EXAMPLE, 2, draw, 0)
        assert all(query == "q" for query, _ in group)
        passages = [passage for _, passage in group]
        assert passages[0] in EXAMPLE.pos
        assert len({*passages[1:]} & {*EXAMPLE.neg}) == 2
    assert {group[0] for group in groups} == {("q", "p1"), ("q", "p2")}
    assert {passage for group in groups for _, passage in group[1:]} == {*EXAMPLE.neg}
    assert groups != [draw_group(EXAMPLE, 2, draw, 1) for draw in draws]
    assert len(draw_group(EXAMPLE, 15, draws[0], 0)) == 5


@pytest.mark.parametrize(
    ("family", "layers"),
    [
        ("llama", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("gemma", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("gpt_neox", {"query_key_value", "dense"}),
        ("gpt2", {"c_attn", "c_proj"}),
    ],
)
def test_attention_layers_are_found_by_structure(
    make_llm: Callable[..., PreTrainedModel], family: str, layers: set[str]
) -> None:
    names = attention_projections(make_llm(family))
    assert {name.rpartition(".")[2] for name in names} == layers
    assert len(names) == 3 * len(layers)
    assert not any("mlp" in name for name in names)


def test_ranking_quality_by_hand(llm_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = {"p1": 1.0, "p2": 3.0, "n1": 2.0, "n2": 4.0, "n3": 3.0, "n4": 0.0}
    reranker = Reranker.load(llm_dir, format="bge")
    monkeypatch.setattr(reranker, "score", lambda pairs: np.array([scores[passage] for _, passage in pairs]))
    first = RerankerExample("q", ("p2",), ("n1",))
    eleventh = RerankerExample("q", ("p1",), ("n1",) * 10)
    # n2 is above the better positive, n3 ties with it.
    assert positive_ranks(reranker, [first, EXAMPLE, eleventh]) == [1, 3, 11]
    assert ranking_quality([3]) == {"mrr@10": pytest.approx(1 / 3), "recall@1": 0.0}
    assert ranking_quality([1, 3]) == {"mrr@10": pytest.approx(2 / 3), "recall@1": 0.5}
    assert ranking_quality([11]) == {"mrr@10": 0.0, "recall@1": 0.0}


@pytest.mark.parametrize("lora_rank", [8, 0])
def test_training_learns_to_rank(setup: Setup, make_reranker_data: MakeData, tmp_path: Path, lora_rank: int) -> None:
    held_out = make_reranker_data(tmp_path / "held-out.jsonl", 40, seed=1)
    changes = {"max_steps": 80, "learning_rate": 1e-2 if lora_rank else 3e-3, "batch_size": 8, "micro_batch_size": 8}
    losses = setup.losses(held_out, lora_rank=lora_rank, **changes)
    assert len(losses) == 80
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    before, after = json.loads((setup.out / "training.json").read_text())["validations"]
    assert before["recall@1"] < 0.6
    assert after["recall@1"] > 0.9
    quality = ranking_quality(positive_ranks(Reranker.load(setup.out), read_examples(held_out)))
    assert after == pytest.approx({"step": 80, **quality})
    assert (setup.out / "adapter").is_dir() == bool(lora_rank)


@pytest.mark.parametrize("lora_rank", [4, 0])
def test_the_better_weights_are_kept(
    setup: Setup, make_reranker_data: MakeData, tmp_path: Path, lora_rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were the last weights kept, or those before an adapter was merged, the scores would differ."""
    held_out = make_reranker_data(tmp_path / "held-out.jsonl", 8, seed=1)
    kept: list[np.ndarray] = []
    pairs = [("red", "is red"), ("red", "is blue")]

    def measure(self: RerankerLearner, process: int, processes: int) -> dict[str, float]:
        kept.append(self.reranker.score(pairs))
        return {"mrr@10": [0.1, 0.2, 0.9, 0.3][len(kept) - 1]}

    monkeypatch.setattr(RerankerLearner, "validate", measure)
    setup.losses(held_out, validate_every=1, learning_rate=1e-2, lora_rank=lora_rank)
    np.testing.assert_allclose(Reranker.load(setup.out).score(pairs), kept[2], atol=2e-5)
    np.testing.assert_allclose(Reranker.load(setup.out / "last").score(pairs), kept[3], atol=2e-5)
    assert np.abs(kept[2] - kept[3]).max() > 1e-3


def test_gradient_checkpointing_changes_nothing(setup: Setup, tmp_path: Path) -> None:
    for lora_rank in (4, 0):
        plain = setup.losses(out=tmp_path / f"a{lora_rank}", lora_rank=lora_rank)
        assert setup.losses(out=tmp_path / f"b{lora_rank}", lora_rank=lora_rank, gradient_checkpointing=True) == plain


def test_the_first_step_of_full_training_is_adamw_on_the_loss_by_hand(setup: Setup, llm_dir: Path) -> None:
    changes = {"lora_rank": 0, "max_steps": 1, "warmup_ratio": 0.0, "max_gradient_norm": 1e9, "batch_size": 2}
    (first,) = setup.losses(**changes)
    trained = Reranker.load(setup.out).model
    model = AutoModelForCausalLM.from_pretrained(llm_dir)
    reranker = Reranker(model, Reranker.load(llm_dir, format="bge").tokenizer, prompt="Yes or No?")
    examples = read_examples(setup.data)
    loss = torch.tensor(0.0)
    for draw in batch_at(0, len(examples), 2, seed=0):
        rows = reranker.encode(draw_group(examples[draw.example], 4, draw, 0))
        yes = reranker.tokenizer("Yes", add_special_tokens=False)["input_ids"][0]
        logits = torch.stack([model(torch.tensor([row.ids])).logits[0, -1, yes] for row in rows])
        loss = loss - logits.log_softmax(0)[0] / 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-8)
    loss.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    optimizer.step()
    assert first == pytest.approx(loss.item(), abs=1e-5)
    for name, weight in trained.named_parameters():
        # Where a gradient is next to nothing, rounding decides the sign of Adam's first step.
        clear = gradients[name].abs() > 1e-5
        torch.testing.assert_close(weight[clear], dict(model.named_parameters())[name][clear], atol=2e-5, rtol=0)


def test_merged_is_base_plus_adapter(setup: Setup, llm_dir: Path) -> None:
    merged = setup.trained()
    pairs = [("red", "is red"), ("red", "is blue"), ("grey", "is pink")]
    base = AutoModelForCausalLM.from_pretrained(llm_dir)
    adapted = peft.PeftModel.from_pretrained(base, f"{setup.out}/adapter")
    by_hand = Reranker(adapted.get_base_model(), merged.tokenizer, prompt="Yes or No?").score(pairs)
    np.testing.assert_allclose(merged.score(pairs), by_hand, atol=2e-5)
    np.testing.assert_allclose(Reranker.load(f"{setup.out}/adapter").score(pairs), by_hand, atol=1e-5)
    assert np.abs(by_hand - Reranker.load(llm_dir, format="bge", prompt="Yes or No?").score(pairs)).max() > 1e-3


def test_prompt_and_length_are_saved_and_used(setup: Setup, llm_dir: Path) -> None:
    start = Reranker.load(llm_dir, format="bge", prompt="Does it fit?", max_length=100)
    train_reranker(start, setup.arguments(max_steps=1), read_examples(setup.data), setup.out)
    settings = json.loads((setup.out / "reranker.json").read_text())
    assert settings == {"format": "bge", "prompt": "Does it fit?", "max_length": 100}
    trained = Reranker.load(setup.out)
    assert (trained.prompt, trained.max_length) == ("Does it fit?", 100)


def test_equal_seeds_train_equal_rerankers(setup: Setup, tmp_path: Path) -> None:
    first = setup.trained(out=tmp_path / "a")
    torch.rand(5)  # The state that the caller's generator happens to be in is none of training's business.
    second = setup.trained(out=tmp_path / "b")
    other = setup.trained(out=tmp_path / "c", seed=1)
    assert first.fingerprint == second.fingerprint != other.fingerprint


@pytest.mark.parametrize("lora_rank", [4, 0])
def test_micro_batches_do_not_change_the_result(setup: Setup, tmp_path: Path, lora_rank: int) -> None:
    losses = [
        setup.losses(out=tmp_path / str(size), micro_batch_size=size, max_steps=4, lora_rank=lora_rank)
        for size in (1, 3, 4)
    ]
    np.testing.assert_allclose(losses[1:], [losses[0]] * 2, rtol=1e-3)


@pytest.mark.parametrize("lora_rank", [4, 0])
def test_a_stopped_run_goes_on_to_the_same_weights(setup: Setup, tmp_path: Path, lora_rank: int) -> None:
    """With tied embeddings, and with an adapter whose base is not in the saving."""
    whole = setup.trained(out=tmp_path / "whole", lora_rank=lora_rank, max_steps=5)
    learner = RerankerLearner.losses

    def stop(self: RerankerLearner, draws: Any, step: int) -> torch.Tensor:
        if step == 3:
            raise ZeroDivisionError
        return learner(self, draws, step)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(RerankerLearner, "losses", stop)
        setup.losses(lora_rank=lora_rank, max_steps=5, save_every=2)
    changed = setup.arguments(lora_rank=lora_rank, max_steps=5, save_every=2)
    again = train_reranker(setup.start(), changed, read_examples(setup.data), setup.out)
    assert again.step == 5
    assert Reranker.load(setup.out).fingerprint == whole.fingerprint


def test_epochs_decide_the_steps(setup: Setup) -> None:
    assert len(setup.losses(max_steps=None, epochs=2, batch_size=30, negatives=1)) == 2 * 3


def test_lora_targets_can_be_named(setup: Setup, tmp_path: Path) -> None:
    setup.losses(lora_targets=("up_proj",), max_steps=1)
    saved = json.loads((setup.out / "adapter" / "adapter_config.json").read_text())
    assert saved["target_modules"] == ["up_proj"]
    with pytest.raises(InputError, match="nonsense"):
        setup.losses(lora_targets=("nonsense",), out=tmp_path / "other")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("negatives", 0),
        ("batch_size", 0),
        ("micro_batch_size", -1),
        ("epochs", 0),
        ("max_steps", 0),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("warmup_ratio", 1.0),
        ("max_gradient_norm", -1.0),
        ("lora_rank", -1),
        ("lora_alpha", 0.0),
    ],
)
def test_bad_settings(setup: Setup, name: str, value: object) -> None:
    with pytest.raises(InputError, match=f"{name} is {value}"):
        setup.arguments(**{name: value})


def test_full_training_in_bfloat16_is_refused(setup: Setup) -> None:
    start = Reranker.load(setup.model, format="bge", dtype="bfloat16")
    with pytest.raises(InputError, match="float32"):
        train_reranker(start, setup.arguments(lora_rank=0), read_examples(setup.data), setup.out)


def test_nothing_is_written_where_training_fails(setup: Setup, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="loss at step"):
        setup.losses(lora_rank=0, learning_rate=1e30, warmup_ratio=0.0, max_steps=20)
    assert {path.name for path in tmp_path.iterdir()} == {"train.jsonl"}
