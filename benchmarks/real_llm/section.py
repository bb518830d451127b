"""The Markdown section of a study."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.real_llm.results import BOTH, COMPARED, RECOVERED
from benchmarks.real_llm.scores import GENERATED, MEASURES

LABELS = {BOTH: "both data sets", "nq": "NQ", "squad": "SQuAD"}
PICTURES = ("layers", "bytes")
_FACTORS = {measure: 100 for measure in GENERATED} | {"nats": 1}
_NAMES = {"em": "EM", "f1": "F1", "contains": "contains", "nats": "nats"}


def picture_name(llm: str, kind: str) -> str:
    return f"{llm}-{kind}.png"


def section(study: Mapping[str, Any]) -> str:
    """The section for the content of ``table.json``."""
    blocks = [f"## {study['llm']}", _facts(study)]
    records = study["records"]
    for label in dict.fromkeys(record["questions"] for record in records):
        blocks += [f"### Answers, {LABELS[label]}", _answers([one for one in records if one["questions"] == label])]
    first = records[0]["questions"] if records else BOTH
    differences = _differences([record for record in records if record["questions"] == first])
    if differences:
        blocks += [f"### Differences, {LABELS[first]}", differences]
    if study["curve"]:
        blocks += ["### Layers", _curve(study)]
        blocks += [f"![{kind}](real/{picture_name(study['llm'], kind)})" for kind in PICTURES]
    return "\n\n".join(blocks) + "\n"


def _facts(study: Mapping[str, Any]) -> str:
    main = study["layers"]
    retrieved = ", ".join(f"{LABELS[name]} {100 * share:.0f} %" for name, share in study["retrieved"].items())
    versions = ", ".join(f"{name} {value}" for name, value in study["machine"].items() if value is not None)
    return "\n".join(
        [
            f"- {study['depth']} layers. n is the number of questions with generated answers; nats use the first "
            f"{study['settings']['limit_nats']} questions of each data set.",
            f"- Rows without a number of layers have experts in {len(main)} layers: {' '.join(map(str, main))}.",
            f"- A passage has {study['passage_tokens']:.0f} tokens on average (at most 256).",
            f"- The first passage retrieved by MiniLM has an answer for: {retrieved}.",
            f"- `{study['command']}`",
            f"- {versions}",
        ]
    )


def _answers(records: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for record in records:
        cells = [with_interval(record[measure], _FACTORS[measure]) for measure in MEASURES]
        recovered = record.get("recovered")
        cells += [_share(recovered[measure]) if recovered else "" for measure in RECOVERED]
        lines.append([record["row"], record["layers"], record["n"], *cells])
    names = [_NAMES[measure] for measure in MEASURES] + [f"recovered, {_NAMES[measure]}" for measure in RECOVERED]
    return markdown_table(["row", "layers", "n", *names], lines)


def _differences(records: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        [
            record["row"],
            other,
            found["n"],
            *(with_interval(found[measure], _FACTORS[measure], "+") for measure in COMPARED),
        ]
        for record in records
        for other, found in record["differences"].items()
    ]
    return markdown_table(["row", "against", "n", *(_NAMES[measure] for measure in COMPARED)], lines) if lines else ""


def _curve(study: Mapping[str, Any]) -> str:
    lines = [
        [
            point["number"],
            point["layers"],
            f"{point['bytes']:,}",
            f"{point['bytes'] * study['passage_tokens'] / 1000:.0f}",
            point["n"],
            *(_share(point["recovered"][measure]) for measure in RECOVERED),
        ]
        for point in study["curve"]
    ]
    names = [f"recovered, {_NAMES[measure]}" for measure in RECOVERED]
    return markdown_table(["number", "layers", "bytes per passage token", "KB per passage", "n", *names], lines)


def with_interval(interval: Mapping[str, float], factor: float, sign: str = "") -> str:
    """``value (low to high)``, times ``factor``; with ``sign="+"``, every number has a sign."""
    digits = f"{sign}.{1 if factor == 100 else 2}f"
    value, low, high = (format(factor * interval[name], digits) for name in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def _share(interval: Mapping[str, float] | None) -> str:
    return "not known" if interval is None else "{value:.2f} ({low:.2f} to {high:.2f})".format(**interval)


def markdown_table(header: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
