"""Recognition of a reranker by its checkpoint: what scores its pairs, and in which format."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.repocard import metadata_load
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import cached_file

from genpoe_plugin.errors import InputError
from genpoe_plugin.hub import loaded_from
from genpoe_plugin.json_text import read_json
from genpoe_plugin.selection.reranker_format import BGE, CHOICES, QWEN3, RerankerFormat, format_from, read_format

SETTINGS_FILE = "reranker.json"
LATE_INTERACTION = "MultiVectorEncoder"
FAMILIES = {"bge-reranker-v2-gemma": BGE, "qwen3-reranker": QWEN3}
"""The format of models with such a name, or made from models with such a name."""


@dataclass(frozen=True)
class Recognised:
    """What a checkpoint is.

    Attributes:
        format: how its decoder LLM reads a pair; None for a model of sentence-transformers.
        classifies: whether the score of a decoder is that of a classification head, not a token's logit.
        settings: ``prompt`` and ``max_length`` saved with a trained reranker.
        late_interaction: whether the model of sentence-transformers has a vector per token, not a score per pair.
    """

    format: RerankerFormat | None
    classifies: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    late_interaction: bool = False


def recognise(name: str, format_name: str | None = None) -> Recognised:
    """Recognise a reranker. The first of these rules that applies decides:

    1. ``format_name``, a built-in format or a template file;
    2. ``reranker.json``, which `genpoe train reranker` writes; without a format in it, that of BGE;
    3. the files of a CrossEncoder (sentence-transformers 5.4 and later), or of a late-interaction model;
    4. a name that contains ``bge-reranker-v2-gemma`` or ``Qwen3-Reranker``: that of the model, of an adapter's base
       model, or the ``base_model`` of its card;
    5. a classification head on an encoder, or one that an earlier CrossEncoder saved.

    Args:
        name: a directory, or a hub repository as ``user/name`` or ``user/name@revision``.
        format_name: format of a decoder LLM.

    Raises:
        InputError: there is no such model, none of the rules applies, or a format was given for an encoder.
    """
    checkpoint = _Checkpoint(name)
    if format_name is not None:
        return checkpoint.decoder(read_format(format_name))
    if checkpoint.trained is not None:
        return checkpoint.decoder(checkpoint.trained_format)
    if (model_type := checkpoint.sentence_transformers_type) is not None:
        if model_type == LATE_INTERACTION:
            return Recognised(None, late_interaction=True)
        if model_type != "CrossEncoder":
            raise InputError(f"{name}: a {model_type} of sentence-transformers, which encodes texts; give a reranker")
        return Recognised(None)
    for model in checkpoint.names():
        for family, known in FAMILIES.items():
            if family in model.lower():
                return checkpoint.decoder(known)
    if checkpoint.classifies and (checkpoint.is_encoder or "sentence_transformers" in checkpoint.config):
        return Recognised(None)
    raise InputError(
        f"{name}: a reranker of unknown format ({checkpoint.architecture}); give the one that it was trained with as "
        f"reranker_format (--reranker-format): {CHOICES}; likelihood is for any LLM"
    )


def format_to_train(name: str, format_name: str | None = None) -> RerankerFormat:
    """The format to train a decoder LLM in: ``format_name``, else that of a known reranker, else BGE's.

    Raises:
        InputError: there is no format ``format_name``.
    """
    if format_name is not None:
        return read_format(format_name)
    try:
        return recognise(name).format or BGE
    except InputError:  # an LLM that is no reranker yet
        return BGE


class _Checkpoint:
    """The small files of a checkpoint.

    Raises:
        InputError: there is no such model, or its configuration cannot be read.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._repository, of_hub = loaded_from(name)
        self._revision = of_hub.get("revision")
        adapter = self._json("adapter_config.json")
        config = self._json("config.json")
        if config is None and adapter is None:
            if Path(name).is_dir():
                raise InputError(f"{name}: not a model (no config.json)")
            raise InputError(f"{name}: no such directory, and no such model on the hub (or the hub is unreachable)")
        self.config, self._adapter = config or {}, adapter or {}
        self.trained = self._json(SETTINGS_FILE)

    @property
    def architecture(self) -> str:
        """The class of the model."""
        return next(iter(self.config.get("architectures") or []), "a model of unknown class")

    @property
    def classifies(self) -> bool:
        """Whether the model has a classification head."""
        return self.architecture.endswith("ForSequenceClassification")

    @property
    def is_encoder(self) -> bool:
        """Whether the model is of a family of encoders: those that have masked language models."""
        return self.config.get("model_type") in MODEL_FOR_MASKED_LM_MAPPING_NAMES

    @property
    def sentence_transformers_type(self) -> str | None:
        """The class that sentence-transformers saved; None for other checkpoints."""
        if self._path("modules.json") is None:
            return None
        settings = self._json("config_sentence_transformers.json") or {}
        # PyLate, from which sentence-transformers has these models, saves no type but prefixes.
        default = LATE_INTERACTION if "query_prefix" in settings else "SentenceTransformer"
        return str(settings.get("model_type", default))

    @cached_property
    def trained_format(self) -> RerankerFormat | None:
        """The format in ``reranker.json``; None without that file."""
        if self.trained is None:
            return None
        return format_from(self.trained.get("format", "bge"), Path(str(self._path(SETTINGS_FILE))))

    def names(self) -> list[str]:
        """The names of the model and of the models that it was made from, without the users' names."""
        card = self._path("README.md")
        try:
            metadata = metadata_load(card) if card is not None else None
        except (ValueError, yaml.YAMLError):  # a card without valid metadata says nothing
            metadata = None
        bases = (metadata or {}).get("base_model") or []
        named = [
            self._repository,
            self._adapter.get("base_model_name_or_path"),
            self.config.get("_name_or_path"),
            *([bases] if isinstance(bases, str) else bases),
        ]
        return [_short(str(model)) for model in named if model]

    def decoder(self, known: RerankerFormat | None) -> Recognised:
        """The checkpoint as a decoder LLM with the settings that it was trained with, if it was in this format.

        Raises:
            InputError: it is an encoder, or ``reranker.json`` is invalid.
        """
        if self.is_encoder:
            raise InputError(
                f"{self.name}: not a causal language model but an encoder ({self.architecture}), whose tokenizer says "
                "how it reads a pair; reranker formats, and the training of rerankers, are for decoder LLMs"
            )
        if self.trained is None or known != self.trained_format:
            return Recognised(known, self.classifies)
        try:
            settings = {"prompt": str(self.trained["prompt"]), "max_length": int(self.trained["max_length"])}
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f'{self._path(SETTINGS_FILE)}: invalid reranker settings; they must be {{"format": a format, '
                '"prompt": text, "max_length": number}'
            ) from error
        return Recognised(known, self.classifies, settings)

    def _path(self, file: str) -> Path | None:
        try:
            found = cached_file(self._repository, file, revision=self._revision)
        except OSError:
            return None
        return None if found is None else Path(found)

    def _json(self, file: str) -> dict[str, Any] | None:
        if (path := self._path(file)) is None:
            return None
        try:
            content = read_json(path)
        except ValueError as error:
            raise InputError(f"{path}: damaged (not JSON)") from error
        if not isinstance(content, dict):
            raise InputError(f"{path}: damaged (not a JSON object)")
        return content


def _short(name: str) -> str:
    """The last part of a name; the repository, for a directory in the hub's cache."""
    parts = Path(name).parts
    return next((part for part in parts if part.startswith("models--")), parts[-1] if parts else name)
