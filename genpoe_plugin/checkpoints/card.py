"""The model card of a checkpoint: its model, training, scores, and the commands to evaluate it.

The Hugging Face hub reads the front matter; the rest is Markdown for readers.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from genpoe_plugin import __version__
from genpoe_plugin.files import atomic_file, file_digest
from genpoe_plugin.hub import split_revision
from genpoe_plugin.provenance import installed_versions

CARD = "README.md"
TAGS = {
    "hypernetwork": ("genpoe", "hypernetwork", "retrieval-augmented-generation", "question-answering"),
    "experts": ("genpoe", "attention-experts", "retrieval-augmented-generation", "question-answering"),
    "reranker": ("genpoe", "reranker", "text-ranking", "question-answering"),
}
TITLES = {"hypernetwork": "Hypernetwork", "experts": "Attention experts", "reranker": "Reranker"}
LOSS, VALIDATION, PICTURE = "loss.csv", "validation.csv", "curves.png"
CALIBRATION, CALIBRATION_PICTURE = "calibration.csv", "calibration.png"
SHOWN = (LOSS, VALIDATION, PICTURE, CALIBRATION, CALIBRATION_PICTURE)
"""Optional files beside a card that it shows or links."""
_TASKS = {"hypernetwork": "question-answering", "experts": "question-answering", "reranker": "text-ranking"}
_METRICS = {"em": "exact_match", "f1": "f1"}  # the hub's names of metrics
_LOADED = re.compile(r'GenPoEModel\.from_pretrained\("(?:[^"\\]|\\.)*", ("(?:[^"\\]|\\.)*")')


@dataclass(frozen=True)
class DataFile:
    """A data file of a training.

    Attributes:
        use: use of the file.
        path: path as in the command.
        sha256: SHA-256 of the file, in hexadecimal.
        examples: number of examples from the file, which may be below its number of lines.
    """

    use: Literal["training", "validation", "calibration"]
    path: str
    sha256: str
    examples: int

    @classmethod
    def read(cls, use: Literal["training", "validation", "calibration"], path: str | Path, examples: int) -> DataFile:
        """Hash and describe the file at ``path``."""
        return cls(use, str(path), file_digest(path), examples)


def _versions() -> dict[str, str]:
    """Versions of this package, Python, and the libraries that decide a result."""
    libraries = installed_versions(("torch", "transformers"))
    return {"genpoe": __version__, **libraries, "python": platform.python_version()}


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """The content of a model card, as plain data.

    Paths may be local: a card shows only the last part of each.

    Attributes:
        kind: kind of checkpoint; ``experts`` are untrained experts in the LLM's attention.
        base_model: the frozen LLM of a hypernetwork or experts, or the initial model of a reranker: directory or hub
            name.
        out: the checkpoint's directory, or its hub repository.
        form: facts about the model by name, such as dimensions and number of parameters.
        data: the data files; questions with passages for a hypernetwork.
        arguments: all arguments of the training, by name.
        command: the words of the command that created the checkpoint.
        steps: number of optimizer steps; 0 without training.
        validations: ``{"step": ..., measure: value, ...}`` of every validation, in order; for experts, the result of
            the calibration.
        best: step of the checkpoint's weights; None for the last step.
        lm_eval_arguments: model arguments to evaluate a hypernetwork with, besides ``pretrained``, ``mode`` and
            ``hypernetwork``, such as ``num_passages``.
        licence: hub name of the licence; None for no licence.
        datasets: hub names of the training data sets.
        versions: software versions of the training.
    """

    kind: Literal["hypernetwork", "experts", "reranker"]
    base_model: str
    out: str
    form: Mapping[str, Any]
    data: Sequence[DataFile]
    arguments: Mapping[str, Any]
    command: Sequence[str]
    steps: int
    validations: Sequence[Mapping[str, float]] = ()
    best: int | None = None
    lm_eval_arguments: Mapping[str, Any] = field(default_factory=dict)
    licence: str | None = None
    datasets: Sequence[str] = ()
    versions: Mapping[str, str] = field(default_factory=_versions)


def write_card(directory: str | Path, card: ModelCard) -> None:
    """Write ``README.md`` into ``directory`` atomically.

    The card shows the curves if ``curves.png`` exists (see :func:`genpoe_plugin.training.curves.write_curves`).
    """
    directory = Path(directory)
    front_matter = _front_matter(card)
    card = _without_folders(card)
    sections = [
        f"# {TITLES[card.kind]} for {_code(card.base_model)}",
        _about(card),
        _table(["made of", ""], _pairs(card.form)),
        "## Scores",
        *(_calibration(directory) if card.kind == "experts" else _scores(card, directory)),
        "## How to use and evaluate it",
        *(_reranker_use(card) if card.kind == "reranker" else _hypernetwork_use(card)),
        *_making(card),
        _table(
            ["data", "use", "examples", "SHA-256"],
            ([_code(file.path), file.use, f"{file.examples:,}", _code(file.sha256)] for file in card.data),
        ),
        _table(["argument", "value"], _pairs(card.arguments)),
        _table(["software", "version"], _pairs(card.versions)),
    ]
    with atomic_file(directory / CARD) as temporary:
        body = "\n\n".join(section for section in sections if section)
        # File names may contain bytes that are not text; they must not prevent the card.
        text = f"---\n{front_matter}\n---\n\n{body}\n"
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def lm_eval_command(card: ModelCard, tasks: Sequence[str], data: str | None = None, **arguments: str) -> list[str]:
    """The words of the lm_eval command that evaluates a hypernetwork.

    Args:
        card: the hypernetwork's card.
        tasks: names of the tasks.
        data: a file of questions that replace those of the tasks.
        arguments: further model arguments.
    """
    model = {"pretrained": card.base_model, "mode": "genpoe", "hypernetwork": card.out}
    # As JSON: in a key=value list, lm_eval splits paths at commas, and reads a directory called 7 as a number.
    words = ["--model_args", _json({**model, **card.lm_eval_arguments, **arguments}), "--tasks", ",".join(tasks)]
    if data is not None:
        words += ["--metadata", _json({"genpoe_data": data})]
    return ["lm_eval", "--model", "genpoe", *words, "--batch_size", "16"]


def name_in_card(text: str, name: str) -> str:
    """Replace the checkpoint's name in a card's examples and commands, for instance by its hub repository.

    A card without the Python example is returned unchanged.
    """
    example = _LOADED.search(text)
    if example is None:
        return text
    in_a_shell = example[1].replace("'", "'\"'\"'")  # as shlex quotes it
    return text.replace(example[1], _json(name)).replace(in_a_shell, _json(name))


def _front_matter(card: ModelCard) -> str:
    results = list(_results(_without_folders(card)))
    return ModelCardData(
        base_model=split_revision(card.base_model)[0] if _is_hub_name(card.base_model) else None,
        datasets=list(card.datasets) or None,
        eval_results=results or None,
        library_name="transformers" if card.kind == "reranker" else "genpoe",
        license=card.licence,
        model_name=Path(card.out).name if results else None,
        pipeline_tag=_TASKS[card.kind],
        tags=list(TAGS[card.kind]),
    ).to_yaml()


def _results(card: ModelCard) -> Iterable[EvalResult]:
    """The measures of this checkpoint's weights on held-out data."""
    files = [file for file in card.data if file.use != "training"]
    step = card.steps if card.best is None else card.best
    measured = [row for row in card.validations if row["step"] == step]
    if not files or not measured:
        return
    name = ", ".join(file.path for file in files)
    for measure, value in measured[-1].items():
        if measure != "step":
            yield EvalResult(
                task_type=_TASKS[card.kind],
                dataset_type=Path(files[0].path).name.partition(".")[0] or name,
                dataset_name=name,
                dataset_args={"examples": sum(file.examples for file in files), "use": files[0].use},
                metric_type=_METRICS.get(measure, measure),
                metric_value=round(value, 4),
            )


def _is_hub_name(name: str) -> bool:
    """Whether ``name`` can be a hub model; the hub refuses cards with another base model."""
    try:
        validate_repo_id(split_revision(name)[0])
    except HFValidationError:
        return False
    return not Path(name).exists()


def _without_folders(card: ModelCard) -> ModelCard:
    """The card without the folders of local paths."""
    base_model = card.base_model if _is_hub_name(card.base_model) else Path(card.base_model).name
    return replace(
        card,
        base_model=base_model or card.base_model,
        out=_last_part(card.out),
        data=[replace(file, path=_last_part(file.path)) for file in card.data],
        command=[_last_part(word, card.out) for word in card.command],
    )


def _last_part(word: str, out: str = "") -> str:
    """The last part of a local path such as ``/data/nq/dev.jsonl``; any other word unchanged.

    Args:
        word: the word.
        out: a path that may not exist yet.
    """
    whole = os.path.abspath(word)
    is_path = os.path.isabs(word) or os.path.exists(word) or (os.path.isabs(out) and whole == os.path.abspath(out))
    return Path(whole).name if word and is_path and Path(whole).name else word


def _about(card: ModelCard) -> str:
    if card.kind == "hypernetwork" and card.form.get("head") == "attention":
        return (
            f"It turns a passage into an *expert* in the attention of the frozen LLM {_code(card.base_model)}: keys "
            "and values, which some of its layers compute for the passage and training has added to. The LLM then "
            "answers with what the passage says. It belongs to that LLM and fits no other."
        )
    if card.kind == "hypernetwork":
        return (
            f"It turns a passage into the weights of a small MLP, an *expert*, that is added beside one MLP of the "
            f"frozen LLM {_code(card.base_model)}, so that the LLM answers with what the passage says. It belongs to "
            "that LLM and fits no other."
        )
    if card.kind == "experts":
        return (
            f"It turns a passage into an *expert* in the attention of the frozen LLM {_code(card.base_model)}: the "
            "keys and values that some of its layers compute for the passage. It was not trained. It belongs to that "
            "LLM and fits no other."
        )
    return (
        f"It scores how well a passage answers a question: {_code(card.base_model)}, trained to tell passages with an "
        'answer from those without by the logit of "Yes".'
    )


def _making(card: ModelCard) -> Iterable[str]:
    if card.kind == "experts":
        yield "## How it was made"
    elif card.steps:
        yield "## How it was trained"
    if card.command:
        yield "By" if card.kind == "experts" else f"{card.steps:,} optimizer steps, by"
        yield _block("bash", shlex.join(card.command))


def _calibration(directory: Path) -> Iterable[str]:
    if not (directory / CALIBRATION).is_file():
        yield "The layers were named, not chosen by measurement."
        return
    yield "The layers were chosen by how likely answers are with experts in ever fewer of them."
    yield f"![Share of the gain over bytes of an expert]({CALIBRATION_PICTURE})"
    yield f"The numbers are in [{CALIBRATION}]({CALIBRATION})."


def _scores(card: ModelCard, directory: Path) -> Iterable[str]:
    if not card.validations:
        yield "There was no validation data."
    else:
        by_step = {int(row["step"]): row for row in card.validations}
        steps = [*by_step]
        labels: dict[int, list[str]] = {}
        for label, step in (("first", steps[0]), ("best", card.best), ("last", steps[-1])):
            if step in by_step:
                labels.setdefault(step, []).append(label)
        measures = list(dict.fromkeys(name for row in card.validations for name in row if name != "step"))
        rows = (
            [", ".join(labels[step]), f"{step:,}", *(_score(by_step[step].get(name)) for name in measures)]
            for step in labels
        )
        yield _table(["validation", "step", *map(_code, measures)], rows)
        yield f"The weights here are those of step {card.steps if card.best is None else card.best:,}."
    if (directory / PICTURE).is_file():
        tables = [name for name in (LOSS, VALIDATION) if (directory / name).is_file()]
        yield f"![Loss and validation by step]({PICTURE})"
        yield "The numbers are in " + " and ".join(f"[{name}]({name})" for name in tables) + "."


def _score(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _hypernetwork_use(card: ModelCard) -> Iterable[str]:
    known = ("gguf_file", "trust_remote_code")
    options = "".join(f", {name}={card.lm_eval_arguments[name]!r}" for name in known if name in card.lm_eval_arguments)
    yield "With `pip install lm-eval-genpoe`, in Python:"
    yield _block(
        "python",
        "from genpoe_plugin import GenPoEModel\n\n"
        f"model = GenPoEModel.from_pretrained({_json(card.base_model)}, {_json(card.out)}{options})\n"
        'passages = ["Rossini: Gioachino Rossini was born in Pesaro in 1792."]\n'
        'print(model.generate(["Where was Rossini born?"], [passages]))',
    )
    yield "With [lm-evaluation-harness](https://github.com/EleutherAI/lm-evaluation-harness) and `lm-eval-genpoe`:"
    for file in card.data:
        if file.use == "validation":
            yield "On the questions and passages of its validation (the task only lends its scoring):"
            yield _block("bash", shlex.join(lm_eval_command(card, ["genpoe_nq"], data=file.path)))
    yield "On the test questions of NQ and TriviaQA, with passages from `INDEX`, which `genpoe index build` makes:"
    yield _block("bash", shlex.join(lm_eval_command(card, ["genpoe_nq", "genpoe_tqa"], index="INDEX")))
    yield (
        'Run the same with `"passages": "shuffled"` beside it: another question\'s passages must score worse, '
        "or the experts carry no knowledge."
    )


def _reranker_use(card: ModelCard) -> Iterable[str]:
    yield "Scores of passages, higher is better, in Python:"
    yield _block(
        "python",
        "from genpoe_plugin.selection.reranking import Reranker\n\n"
        f"reranker = Reranker.load({card.out!r})\n"
        'scores = reranker.score([("who wrote it?", "Title: text of a passage"), ("who wrote it?", "Other: text")])',
    )
    command = ["genpoe", "retrieve", "--index", "INDEX", "--questions", "QUESTIONS", "--out", "RESULTS.jsonl"]
    yield "For the passages of `genpoe retrieve`:"
    yield _block("bash", shlex.join([*command, "--reranker", card.out]))
    yield "In `lm_eval --model genpoe` it is the model argument `reranker`."


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _code(value: Any) -> str:
    """A code span that shows ``value`` correctly with any characters.

    Text with line breaks, backslashes or outer spaces is shown as JSON. JSON has no line breaks, and its backslashes
    come in pairs; a single backslash before a pipe in a table would undo the pipe's escape.
    """
    plain = isinstance(value, str) and value.isprintable() and "\\" not in value and value.strip() == value != ""
    text = value if plain else _json(value)
    fence = _fence(text, 1)
    pad = " " if text[0] == "`" or text[-1] == "`" else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def _pairs(values: Mapping[str, Any]) -> Iterable[Sequence[str]]:
    return ([_code(name), _code(value)] for name, value in values.items())


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; empty if there are no rows."""
    lines = [header, ["---"] * len(header), *rows]
    if len(lines) == 2:
        return ""
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _block(language: str, text: str) -> str:
    """A fenced code block whose fence does not occur in ``text``."""
    fence = _fence(text, 3)
    return f"{fence}{language}\n{text}\n{fence}"


def _fence(text: str, least: int) -> str:
    """At least ``least`` backticks, and more than any run of them in ``text``."""
    return "`" * max([least, *(1 + len(run) for run in re.findall("`+", text))])
