"""Training the reranker: its loss by hand, its draws, what it learns, what it writes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from genpoe_plugin.errors import InputError
from genpoe_plugin.reranking import Reranker
from genpoe_plugin.training.reranker import (
    RerankerTrainingConfig,
    attention_projections,
    draw_batches,
    draw_group,
    group_loss,
    ranking_quality,
    train_reranker,
)
from genpoe_plugin.training.reranker_data import RerankerExample, read_examples

MakeData = Callable[..., Path]
EXAMPLE = RerankerExample("q", ("p1", "p2"), ("n1", "n2", "n3", "n4"))


def train(config: RerankerTrainingConfig) -> Reranker:
    train_reranker(config, progress=False)
    return Reranker.load(config.out)


@pytest.fixture
def config(llm_dir: Path, make_reranker_data: MakeData, tmp_path: Path) -> Callable[..., RerankerTrainingConfig]:
    """``config(**changes)``: a short training on the toy task."""

    def make(**changes: object) -> RerankerTrainingConfig:
        settings = {
            "model": str(llm_dir),
            "data": str(make_reranker_data(tmp_path / "train.jsonl", 64, seed=0)),
            "out": str(tmp_path / "out"),
            "negatives": 4,
            "batch_size": 4,
            "micro_batch_size": 4,
            "max_steps": 3,
            "learning_rate": 1e-3,
            "lora_rank": 4,
        }
        return RerankerTrainingConfig(**{**settings, **changes})  # type: ignore[arg-type]

    return make


def test_group_loss_is_the_sum_of_cross_entropies() -> None:
    scores = torch.tensor([1.0, 2.0, -1.0, 0.5, 3.0])
    by_hand = 0.0
    for group in ([1.0, 2.0, -1.0], [0.5, 3.0]):
        by_hand -= math.log(math.exp(group[0]) / sum(math.exp(score) for score in group))
    assert group_loss(scores, [3, 2]).item() == pytest.approx(by_hand, abs=1e-6)


def test_group_loss_has_finite_gradients_for_unequal_groups() -> None:
    scores = torch.tensor([1.0, 2.0, -1.0, 0.5, 3.0], requires_grad=True)
    group_loss(scores, [3, 2]).backward()
    softmax = torch.cat([scores[:3].softmax(0), scores[3:].softmax(0)])
    torch.testing.assert_close(scores.grad, softmax - torch.tensor([1.0, 0, 0, 1.0, 0]))


def test_groups_are_decided_by_their_key() -> None:
    groups = {key: draw_group(EXAMPLE, 2, key) for key in map(str, range(40))}
    for key, group in groups.items():
        assert group == draw_group(EXAMPLE, 2, key)
        assert all(query == "q" for query, _ in group)
        passages = [passage for _, passage in group]
        assert passages[0] in EXAMPLE.pos
        assert len({*passages[1:]} & {*EXAMPLE.neg}) == 2
    assert {group[0] for group in groups.values()} == {("q", "p1"), ("q", "p2")}
    assert {passage for group in groups.values() for _, passage in group[1:]} == {*EXAMPLE.neg}
    assert len(draw_group(EXAMPLE, 15, "0")) == 5


def test_batches_cover_every_epoch_in_another_order() -> None:
    batches = list(islice(draw_batches(10, 4, seed=1), 6))
    epochs = [[pair for batch in batches[:3] for pair in batch], [pair for batch in batches[3:] for pair in batch]]
    for number, epoch in enumerate(epochs):
        assert sorted(epoch) == [(number, index) for index in range(10)]
    assert [index for _, index in epochs[0]] != [index for _, index in epochs[1]]
    assert batches == list(islice(draw_batches(10, 4, seed=1), 6))
    assert batches != list(islice(draw_batches(10, 4, seed=2), 6))


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
    reranker = Reranker.load(llm_dir)
    monkeypatch.setattr(reranker, "score", lambda pairs, progress: np.array([scores[passage] for _, passage in pairs]))
    first = RerankerExample("q", ("p2",), ("n1",))
    # n2 is above the better positive, n3 ties with it.
    assert ranking_quality(reranker, [EXAMPLE]) == {"recall@1": 0.0, "mrr@10": pytest.approx(1 / 3)}
    assert ranking_quality(reranker, [first, EXAMPLE]) == {"recall@1": 0.5, "mrr@10": pytest.approx(2 / 3)}
    eleventh = RerankerExample("q", ("p1",), ("n1",) * 10)
    assert ranking_quality(reranker, [eleventh]) == {"recall@1": 0.0, "mrr@10": 0.0}


@pytest.mark.parametrize("lora_rank", [8, 0])
def test_training_learns_to_rank(
    config: Callable[..., RerankerTrainingConfig], make_reranker_data: MakeData, tmp_path: Path, lora_rank: int
) -> None:
    held_out = str(make_reranker_data(tmp_path / "held-out.jsonl", 40, seed=1))
    changes = {"max_steps": 80, "learning_rate": 1e-2 if lora_rank else 3e-3, "batch_size": 8, "micro_batch_size": 8}
    reranker = train(config(eval_data=held_out, lora_rank=lora_rank, **changes))
    record = json.loads((tmp_path / "out" / "training.json").read_text())
    assert len(record["loss"]) == 80
    assert np.mean(record["loss"][-5:]) < 0.5 * np.mean(record["loss"][:5])
    assert record["before"]["recall@1"] < 0.6
    assert record["after"]["recall@1"] > 0.9
    assert record["after"] == pytest.approx(ranking_quality(reranker, read_examples(held_out)))
    assert record["arguments"]["lora_rank"] == lora_rank
    assert (tmp_path / "out" / "adapter").is_dir() == bool(lora_rank)


def test_the_first_step_of_full_training_is_adamw_on_the_loss_by_hand(
    config: Callable[..., RerankerTrainingConfig], llm_dir: Path, tmp_path: Path
) -> None:
    settings = config(lora_rank=0, max_steps=1, warmup_ratio=0, max_gradient_norm=1e9, batch_size=2)
    trained = train(settings).model
    model = AutoModelForCausalLM.from_pretrained(llm_dir)
    reranker = Reranker(model, Reranker.load(llm_dir).tokenizer, prompt="Yes or No?")
    examples = read_examples(settings.data)
    loss = torch.tensor(0.0)
    for epoch, index in next(draw_batches(len(examples), 2, seed=0)):
        rows = reranker.encode(draw_group(examples[index], 4, f"0-{epoch}-{index}"))
        yes = reranker.tokenizer("Yes", add_special_tokens=False)["input_ids"][0]
        logits = torch.stack([model(torch.tensor([row])).logits[0, -1, yes] for row in rows])
        loss = loss - logits.log_softmax(0)[0] / 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-8)
    loss.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    optimizer.step()
    record = json.loads((tmp_path / "out" / "training.json").read_text())
    assert record["loss"] == [pytest.approx(loss.item(), abs=1e-5)]
    for name, weight in trained.named_parameters():
        # Where a gradient is next to nothing, rounding decides the sign of Adam's first step.
        clear = gradients[name].abs() > 1e-5
        torch.testing.assert_close(weight[clear], dict(model.named_parameters())[name][clear], atol=2e-5, rtol=0)


def test_merged_is_base_plus_adapter(config: Callable[..., RerankerTrainingConfig], llm_dir: Path) -> None:
    settings = config()
    merged = train(settings)
    pairs = [("red", "is red"), ("red", "is blue"), ("grey", "is pink")]
    base = AutoModelForCausalLM.from_pretrained(llm_dir)
    adapted = peft.PeftModel.from_pretrained(base, f"{settings.out}/adapter")
    by_hand = Reranker(adapted.get_base_model(), merged.tokenizer, prompt="Yes or No?").score(pairs)
    np.testing.assert_allclose(merged.score(pairs), by_hand, atol=2e-5)
    np.testing.assert_allclose(Reranker.load(f"{settings.out}/adapter").score(pairs), by_hand, atol=1e-5)
    assert np.abs(by_hand - Reranker.load(llm_dir, prompt="Yes or No?").score(pairs)).max() > 1e-3


def test_the_prompt_of_the_data_is_saved_and_used(
    config: Callable[..., RerankerTrainingConfig], make_reranker_data: MakeData, tmp_path: Path
) -> None:
    data = str(make_reranker_data(tmp_path / "other.jsonl", 8, seed=0, prompt="Does it fit?"))
    reranker = train(config(data=data, max_steps=1, max_length=100))
    assert json.loads((tmp_path / "out" / "reranker.json").read_text()) == {
        "prompt": "Does it fit?",
        "max_length": 100,
    }
    assert (reranker.prompt, reranker.max_length) == ("Does it fit?", 100)


def test_equal_seeds_train_equal_rerankers(config: Callable[..., RerankerTrainingConfig], tmp_path: Path) -> None:
    first = train(config(out=str(tmp_path / "a")))
    torch.rand(5)  # The state that the caller's generator happens to be in is none of training's business.
    second = train(config(out=str(tmp_path / "b")))
    other = train(config(out=str(tmp_path / "c"), seed=1))
    assert first.fingerprint == second.fingerprint != other.fingerprint


@pytest.mark.parametrize("lora_rank", [4, 0])
def test_micro_batches_do_not_change_the_result(
    config: Callable[..., RerankerTrainingConfig], tmp_path: Path, lora_rank: int
) -> None:
    losses = []
    for size in (1, 3, 4):
        train_reranker(config(micro_batch_size=size, max_steps=4, lora_rank=lora_rank), progress=False)
        losses.append(json.loads((tmp_path / "out" / "training.json").read_text())["loss"])
    np.testing.assert_allclose(losses[1:], [losses[0]] * 2, rtol=1e-3)


def test_epochs_decide_the_steps(config: Callable[..., RerankerTrainingConfig], tmp_path: Path) -> None:
    train_reranker(config(max_steps=None, epochs=2, batch_size=30, negatives=1), progress=False)
    assert len(json.loads((tmp_path / "out" / "training.json").read_text())["loss"]) == 2 * 3


def test_lora_targets_can_be_named(config: Callable[..., RerankerTrainingConfig], tmp_path: Path) -> None:
    train_reranker(config(lora_targets=("up_proj",), max_steps=1), progress=False)
    saved = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert saved["target_modules"] == ["up_proj"]
    with pytest.raises(InputError, match="nonsense"):
        train_reranker(config(lora_targets=("nonsense",)), progress=False)


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
        ("max_length", 0),
        ("dtype", "int8"),
    ],
)
def test_bad_settings(config: Callable[..., RerankerTrainingConfig], name: str, value: object) -> None:
    with pytest.raises(InputError, match=f"{name} is {value}"):
        config(**{name: value})


def test_full_training_in_bfloat16_is_refused(config: Callable[..., RerankerTrainingConfig]) -> None:
    with pytest.raises(InputError, match="float32"):
        config(lora_rank=0, dtype="bfloat16")


def test_nothing_is_written_where_training_fails(config: Callable[..., RerankerTrainingConfig], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="loss at step"):
        train_reranker(config(lora_rank=0, learning_rate=1e30, warmup_ratio=0, max_steps=20), progress=False)
    assert {path.name for path in tmp_path.iterdir()} == {"train.jsonl"}
