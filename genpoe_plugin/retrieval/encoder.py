"""Bi-encoders: question and passage vectors whose dot product says how well they fit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import is_sentence_transformer_model
from torch import nn
from transformers import AutoTokenizer, BertTokenizer, DPRContextEncoder, DPRQuestionEncoder
from transformers.utils import logging

from genpoe_plugin.data.passages import Passage
from genpoe_plugin.errors import InputError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DPR_MAX_LENGTH = 256
FINGERPRINT_VALUES = 2**20
FINGERPRINT_TEXT = "Dr. O'Brien's naïve ÉCLAIR cost £3,000 in 東京 (1999)."

Item = TypeVar("Item")


class Encoder(Protocol):
    """What shards, index and retriever need of a bi-encoder.

    ``fingerprint`` stands for all that decides a vector but for rounding: it is the same for a model from the hub and
    from a directory, as safetensors and as .bin, on every device and in every precision. ``precision`` is what it
    computes in, "float32", "float16" or "bfloat16"; ``pooling`` says in words what becomes of the token states.
    """

    @property
    def name(self) -> str: ...
    @property
    def dimension(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def precision(self) -> str: ...
    @property
    def pooling(self) -> str: ...
    def encode_questions(self, questions: Sequence[str]) -> np.ndarray:
        """float32 [n, dimension]."""

    def encode_passages(self, passages: Sequence[Passage]) -> np.ndarray:
        """float32 [n, dimension]."""


def load_encoder(name: str, *, device: str = "cpu", batch_size: int = 64, dtype: str = "float32") -> Encoder:
    """Load a bi-encoder: ``QUESTION_ENCODER,CONTEXT_ENCODER`` for a DPR pair, else a sentence-transformers model; each
    a directory or an id on the hub.

    Args:
        dtype: what it computes in, one of `DTYPES`; the halves are for GPUs. Its vectors are float32 all the same.

    Raises:
        InputError: it cannot be loaded, or is another kind of model.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype}: an encoder computes in one of {', '.join(DTYPES)}")
    question_name, comma, context_name = name.partition(",")
    if comma:
        names = question_name.strip(), context_name.strip()
        return DPREncoder(*names, device=device, batch_size=batch_size, dtype=dtype)
    return SentenceEncoder(name, device=device, batch_size=batch_size, dtype=dtype)


class DPREncoder:
    """The two encoders of Dense Passage Retrieval."""

    pooling = "state of [CLS]"

    def __init__(
        self,
        question_name: str,
        context_name: str,
        *,
        device: str = "cpu",
        batch_size: int = 64,
        dtype: str = "float32",
    ) -> None:
        self.precision = dtype
        self.name = f"{_lasting_name(question_name)},{_lasting_name(context_name)}"
        self._device, self._batch_size = device, batch_size
        self._question_model, self._question_tokenizer = _load_dpr(DPRQuestionEncoder, question_name, device)
        self._context_model, self._context_tokenizer = _load_dpr(DPRContextEncoder, context_name, device)
        sides = [(self._question_model, self._question_tokenizer), (self._context_model, self._context_tokenizer)]
        dimensions = [model.config.projection_dim or model.config.hidden_size for model, _ in sides]
        if dimensions[0] != dimensions[1]:
            raise InputError(f"{self.name}: vectors of {dimensions[0]} and {dimensions[1]} numbers; not a DPR pair")
        self.dimension: int = dimensions[0]
        self.fingerprint = _fingerprint(
            [("dpr", _architecture(model), tokenizer(FINGERPRINT_TEXT)["input_ids"]) for model, tokenizer in sides],
            [model for model, _ in sides],
        )
        for model, _ in sides:  # only now, for the fingerprint is of the weights as they are published
            model.to(DTYPES[dtype])

    def encode_questions(self, questions: Sequence[str]) -> np.ndarray:
        def encode(batch: Sequence[str]) -> np.ndarray:
            return self._embed(self._question_model, self._question_tokenizer, [(question,) for question in batch])

        return _in_batches(questions, len, encode, self._batch_size, self.dimension)

    def encode_passages(self, passages: Sequence[Passage]) -> np.ndarray:
        def encode(batch: Sequence[Passage]) -> np.ndarray:
            texts = [(passage.title, passage.text) if passage.title else (passage.text,) for passage in batch]
            return self._embed(self._context_model, self._context_tokenizer, texts)

        return _in_batches(passages, _passage_length, encode, self._batch_size, self.dimension)

    def _embed(self, model: Any, tokenizer: Any, texts: Sequence[tuple[str, ...]]) -> np.ndarray:
        # A batch may mix passages of one segment (no title) and of two.
        batch = [segments if len(segments) > 1 else segments[0] for segments in texts]
        inputs = tokenizer(batch, truncation=True, max_length=DPR_MAX_LENGTH, padding=True, return_tensors="pt")
        inputs = inputs.to(self._device)
        # DPR was trained with segment 0 throughout; the tokenizer's ones for the text would change the vectors.
        token_types = torch.zeros_like(inputs["input_ids"])
        with torch.inference_mode():
            output = model(inputs["input_ids"], attention_mask=inputs["attention_mask"], token_type_ids=token_types)
        return output.pooler_output.float().cpu().numpy()  # the raw [CLS] state, whatever its name says


class SentenceEncoder:
    """Any text encoder in the form of sentence-transformers, with its own pooling and its own prompts.

    Vectors are normalised where the model compares by cosine, as the library itself would then do.
    """

    def __init__(self, name: str, *, device: str = "cpu", batch_size: int = 64, dtype: str = "float32") -> None:
        self.name, self.precision = _lasting_name(name), dtype
        self._batch_size = batch_size
        with _loading(name, "a sentence-transformers encoder"):
            known = is_sentence_transformer_model(name)
        # The library would put mean pooling on whatever it can load, a DPR encoder included.
        if not known:
            raise InputError(
                f"{name}: no sentence-transformers encoder found (no modules.json, here or on the hub);"
                " for DPR give two models as QUESTION_ENCODER,CONTEXT_ENCODER"
            )
        with _loading(name, "a sentence-transformers encoder"):
            model = SentenceTransformer(name, device=device).float().eval()
        self._model, self._normalise = model, model.similarity_fn_name == "cosine"
        self.dimension: int = len(self._encode(model.encode_query, [FINGERPRINT_TEXT])[0])
        modules = [(type(module).__name__, str(getattr(module, "pooling_mode", ""))) for module in model]
        description = {
            "modules": modules,
            "architecture": _architecture(getattr(model[0], "auto_model", model[0])),
            "max_length": model.max_seq_length,
            "prompts": model.prompts,
            "similarity": model.similarity_fn_name,
            "tokens": model.preprocess([FINGERPRINT_TEXT])["input_ids"].tolist(),
        }
        self.fingerprint = _fingerprint(description, [model])
        poolings = [pooling for _, pooling in modules if pooling]
        self.pooling = ", ".join([*poolings, "normalised"] if self._normalise else poolings)
        model.to(DTYPES[dtype])  # only now, for the fingerprint is of the weights as they are published

    def encode_questions(self, questions: Sequence[str]) -> np.ndarray:
        return self._encode(self._model.encode_query, list(questions))

    def encode_passages(self, passages: Sequence[Passage]) -> np.ndarray:
        return self._encode(self._model.encode_document, [passage.string for passage in passages])

    def _encode(self, encode: Callable[..., np.ndarray], texts: list[str]) -> np.ndarray:
        if not texts:
            return np.zeros((0, self.dimension), np.float32)
        # Sorts by length and restores the order by itself.
        vectors = encode(texts, batch_size=self._batch_size, show_progress_bar=False).astype(np.float32)
        if self._normalise:  # here, because in half precision it would be a thousandth off
            vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return vectors


def _passage_length(passage: Passage) -> int:
    return len(passage.title) + len(passage.text)


def _in_batches(
    items: Sequence[Item],
    length: Callable[[Item], int],
    encode: Callable[[Sequence[Item]], np.ndarray],
    batch_size: int,
    dimension: int,
) -> np.ndarray:
    """Encode items of like length together, so that little is padding, and return vectors in the items' order."""
    order = sorted(range(len(items)), key=lambda i: length(items[i]), reverse=True)
    vectors = np.zeros((len(items), dimension), np.float32)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        vectors[rows] = encode([items[i] for i in rows])
    return vectors


def _load_dpr(model_class: Any, name: str, device: str) -> tuple[Any, Any]:
    kind = f"a {model_class.__name__}"
    with _loading(name, kind):
        model, report = model_class.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(name)
        if type(tokenizer).__name__.startswith("DPR"):
            # BERT's by another name, but that of transformers 5.0 forgets that texts are put into lower case.
            tokenizer = BertTokenizer.from_pretrained(name)
        model = model.to(device).eval()
    # The wrong class loads as well, with random weights in place of those that it misses.
    if missing := report["missing_keys"] or report["mismatched_keys"]:
        raise InputError(f"{name}: not {kind} ({len(missing)} weights missing); are the two encoders in order?")
    return model, tokenizer


@contextmanager
def _loading(name: str, kind: str) -> Iterator[None]:
    """Turn whatever goes wrong into one line, and keep transformers' own table of missing weights quiet."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    except Exception as error:  # the libraries raise errors of a dozen classes for a missing or damaged model
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{name}: cannot be loaded as {kind} ({reason})") from error
    finally:
        logging.set_verbosity(verbosity)


def _lasting_name(name: str) -> str:
    """Directories by absolute path, so that an index finds its encoder from wherever it is opened."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def _architecture(model: Any) -> dict[str, Any]:
    """What decides a transformer's function and does not show in the shapes of its weights."""
    config = getattr(model, "config", None)
    return {key: getattr(config, key, None) for key in ("model_type", "num_attention_heads", "hidden_act")}


def _fingerprint(description: Any, models: Sequence[nn.Module]) -> str:
    """sha256 over a description and the weights, of each at most 2**20 evenly spaced values, so that large models take
    seconds. Names and order of the weights do not count: they change between library versions."""
    weights = [sorted(_weight_digest(weight) for weight in model.parameters()) for model in models]
    return hashlib.sha256(json.dumps([description, weights], sort_keys=True).encode()).hexdigest()


def _weight_digest(weight: torch.Tensor) -> str:
    step = max(1, weight.numel() // FINGERPRINT_VALUES)
    values = weight.detach().flatten()[::step].float().cpu().numpy()
    return hashlib.sha256(f"{tuple(weight.shape)}".encode() + values.tobytes()).hexdigest()
