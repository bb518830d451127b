"""The Markdown section of a study of trainings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.real_llm.section import markdown_table, with_interval

_HEADER = (
    "training",
    "seed",
    "numbers trained",
    "KB a passage",
    "n",
    "EM",
    "F1",
    "nats",
    "of the prompt",
    "of RAG, trained",
)
_CONTROLS = ("training", "seed", "passage", "n", "EM", "F1", "nats")


def ladder_section(study: Mapping[str, Any]) -> str:
    """The section for the content of ``ladder.json``."""
    rows = study["rows"]
    arguments = study["arguments"]
    facts = [
        f"- Experts in the attention are in the layers {' '.join(map(str, study['layers']))}.",
        f"- {arguments['max_steps']} steps of {arguments['batch_size']} questions at learning rate "
        f"{arguments['learning_rate']:g}, from the training splits of NQ and SQuAD. `rag_lora` is RAG with a LoRA "
        f"adapter of rank {study['lora_rank']}, trained on the same questions with their passages in the prompt.",
        "- **of the prompt** is the gain in F1 over closed-book answering, divided by the gain of the passage in the "
        "prompt; **of RAG, trained** divides by the gain of `rag_lora`. KB are those of keys and values in 16 bits.",
        f"- `{study['command']}`",
        f"- {', '.join(f'{name} {value}' for name, value in study['machine'].items() if value is not None)}",
    ]
    right = [row for row in rows if row["passage"] == "right"]
    controls = [row for row in rows if row["passage"] != "right"]
    blocks = [f"## {study['llm']}, trained", "\n".join(facts), _answers(right, study["passage_tokens"])]
    if controls:
        blocks += ["### With other passages", markdown_table(_CONTROLS, [_control(row) for row in controls])]
    return "\n\n".join(blocks) + "\n"


def _answers(rows: Sequence[Mapping[str, Any]], tokens: float) -> str:
    lines = []
    for row in rows:
        unit = row["unit_bytes"]
        size = "" if unit is None else f"{unit * -(-tokens // row['window']) / 1000:.0f}"
        shares = [_share(row.get(name)) for name in ("of_prompt", "of_rag_lora")]
        lines.append([row["row"], row["seed"], f"{row['parameters']:,}", size, row["n"], *_measures(row), *shares])
    return markdown_table(_HEADER, lines)


def _control(row: Mapping[str, Any]) -> list[Any]:
    return [row["row"], row["seed"], row["passage"], row["n"], *_measures(row)]


def _measures(row: Mapping[str, Any]) -> list[str]:
    factors = {"em": 100, "f1": 100, "nats": 1}
    return [with_interval(row[name], factor) if name in row else "" for name, factor in factors.items()]


def _share(interval: Mapping[str, float] | None) -> str:
    return "" if interval is None else "{value:.2f} ({low:.2f} to {high:.2f})".format(**interval)
