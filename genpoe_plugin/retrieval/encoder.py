"""Bi-encoders: models that encode questions and passages as vectors; the inner product is the relevance score."""

from __future__ import annotations

import hashlib
import json
import logging
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
from transformers.utils import logging as transformers_logging

from genpoe_plugin.data.passages import Passage
from genpoe_plugin.errors import InputError
from genpoe_plugin.retrieval.encoder_options import DEFAULT_OPTIONS, EncoderOptions, family_prompts

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DPR_MAX_LENGTH = 256
PASSAGE_PROMPTS = ("document", "passage", "corpus")  # names of prompts in checkpoints
FINGERPRINT_VALUES = 2**20
FINGERPRINT_TEXT = "Dr. O'Brien's naïve ÉCLAIR cost £3,000 in 東京 (1999)."

Item = TypeVar("Item")

_log = logging.getLogger(__name__)


class Encoder(Protocol):
    """The interface of a bi-encoder for shards, index and retriever.

    Attributes:
        name: hub name, or absolute path of a directory.
        dimension: dimension of the vectors.
        fingerprint: hash of everything that decides a vector, except rounding. It is the same for a model from the hub
            or a directory, as safetensors or .bin, on every device and in every precision.
        precision: dtype of the computation: "float32", "float16" or "bfloat16".
        pooling: description of how token states become a vector.
        options: the prompts and the cut that are in use. With them, `load_encoder` gives the same encoder again.
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
    @property
    def options(self) -> EncoderOptions: ...
    def encode_questions(self, questions: Sequence[str]) -> np.ndarray:
        """Question vectors, float32 ``[n, dimension]``."""

    def encode_passages(self, passages: Sequence[Passage]) -> np.ndarray:
        """Passage vectors, float32 ``[n, dimension]``."""


def load_encoder(
    name: str,
    *,
    device: str = "cpu",
    batch_size: int = 64,
    dtype: str = "float32",
    options: EncoderOptions = DEFAULT_OPTIONS,
) -> Encoder:
    """Load a bi-encoder.

    Args:
        name: a sentence-transformers model, or a DPR pair as ``QUESTION_ENCODER,CONTEXT_ENCODER``; each a directory or
            a hub name.
        device: device of the model.
        batch_size: texts per forward pass.
        dtype: dtype of the computation, one of `DTYPES`; half precision is for GPUs. Vectors are always float32.
        options: prompts and cut of a sentence-transformers model.

    Raises:
        InputError: the model cannot be loaded, is not a bi-encoder, or does not have the options.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype}: it must be one of {', '.join(DTYPES)}")
    question_name, comma, context_name = name.partition(",")
    if comma:
        names = question_name.strip(), context_name.strip()
        if options.question_prompt or options.passage_prompt or options.dimensions:
            raise InputError(
                f"{name}: a DPR pair has neither prompts nor dimensions to choose; leave these options out"
            )
        return DPREncoder(*names, device=device, batch_size=batch_size, dtype=dtype)
    return SentenceEncoder(name, device=device, batch_size=batch_size, dtype=dtype, options=options)


class DPREncoder:
    """The question encoder and the context encoder of Dense Passage Retrieval (DPR)."""

    pooling = "state of [CLS]"
    options = EncoderOptions("", "")

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
        self.name = f"{_absolute_name(question_name)},{_absolute_name(context_name)}"
        self._device, self._batch_size = device, batch_size
        self._question_model, self._question_tokenizer = _load_dpr(DPRQuestionEncoder, question_name, device)
        self._context_model, self._context_tokenizer = _load_dpr(DPRContextEncoder, context_name, device)
        sides = [(self._question_model, self._question_tokenizer), (self._context_model, self._context_tokenizer)]
        dimensions = [model.config.projection_dim or model.config.hidden_size for model, _ in sides]
        if dimensions[0] != dimensions[1]:
            raise InputError(
                f"{self.name}: not a DPR pair, their vectors have dimensions {dimensions[0]} and {dimensions[1]}"
            )
        self.dimension: int = dimensions[0]
        self.fingerprint = _fingerprint(
            [("dpr", _architecture(model), tokenizer(FINGERPRINT_TEXT)["input_ids"]) for model, tokenizer in sides],
            [model for model, _ in sides],
        )
        for model, _ in sides:  # converted after the fingerprint, which covers the original weights
            model.to(DTYPES[dtype])

    def encode_questions(self, questions: Sequence[str]) -> np.ndarray:
        """Question vectors, float32 ``[n, dimension]``."""

        def encode(batch: Sequence[str]) -> np.ndarray:
            return self._embed(self._question_model, self._question_tokenizer, [(question,) for question in batch])

        return _in_batches(questions, len, encode, self._batch_size, self.dimension)

    def encode_passages(self, passages: Sequence[Passage]) -> np.ndarray:
        """Passage vectors, float32 ``[n, dimension]``."""

        def encode(batch: Sequence[Passage]) -> np.ndarray:
            texts = [(passage.title, passage.text) if passage.title else (passage.text,) for passage in batch]
            return self._embed(self._context_model, self._context_tokenizer, texts)

        return _in_batches(passages, _passage_length, encode, self._batch_size, self.dimension)

    def _embed(self, model: Any, tokenizer: Any, texts: Sequence[tuple[str, ...]]) -> np.ndarray:
        # A batch may contain passages with one segment (no title) and with two.
        batch = [segments if len(segments) > 1 else segments[0] for segments in texts]
        inputs = tokenizer(batch, truncation=True, max_length=DPR_MAX_LENGTH, padding=True, return_tensors="pt")
        inputs = inputs.to(self._device)
        # DPR was trained with segment 0 only; the tokenizer's segment 1 for the text would change the vectors.
        token_types = torch.zeros_like(inputs["input_ids"])
        with torch.inference_mode():
            output = model(inputs["input_ids"], attention_mask=inputs["attention_mask"], token_type_ids=token_types)
        return output.pooler_output.float().cpu().numpy()  # despite its name, the raw [CLS] state


class SentenceEncoder:
    """A sentence-transformers model, with its own pooling.

    The prompts are those of the options, else the checkpoint's own, else those of its family, with a line on stderr.
    Vectors are normalised if the model's similarity is the cosine, and after a cut also if its last module normalises.
    """

    def __init__(
        self,
        name: str,
        *,
        device: str = "cpu",
        batch_size: int = 64,
        dtype: str = "float32",
        options: EncoderOptions = DEFAULT_OPTIONS,
    ) -> None:
        self.name, self.precision = _absolute_name(name), dtype
        self._batch_size = batch_size
        with _loading(name, "a sentence-transformers encoder"):
            known = is_sentence_transformer_model(name)
        # The library would add mean pooling to any model that it can load, even a DPR encoder.
        if not known:
            raise InputError(
                f"{name}: no sentence-transformers encoder found (no modules.json, here or on the hub);"
                " for DPR give two models as QUESTION_ENCODER,CONTEXT_ENCODER"
            )
        with _loading(name, "a sentence-transformers encoder"):
            model = SentenceTransformer(name, device=device).float().eval()
        modules = [(type(module).__name__, str(getattr(module, "pooling_mode", ""))) for module in model]
        self._model, self._normalise = model, model.similarity_fn_name == "cosine"
        library = _library_prompts(model)
        self._cut: int | None = None
        full = len(self._encode(model.encode_query, library[0], [FINGERPRINT_TEXT])[0])
        if options.dimensions is not None and options.dimensions != full:
            if not 0 < options.dimensions < full:
                raise InputError(f"{name}: its vectors have {full} dimensions, not {options.dimensions}; give fewer")
            self._cut = options.dimensions
            self._normalise = self._normalise or modules[-1][0] == "Normalize"
        self.dimension: int = self._cut or full
        self._prompts = self._chosen_prompts(options, library)
        self.options = EncoderOptions(*self._prompts, self._cut)
        description = {
            "modules": modules,
            "architecture": _architecture(getattr(model[0], "auto_model", model[0])),
            "max_length": model.max_seq_length,
            "prompts": model.prompts,
            "similarity": model.similarity_fn_name,
            "tokens": model.preprocess([FINGERPRINT_TEXT])["input_ids"].tolist(),
        }
        # Only what differs from the library, so that the fingerprints of older indexes keep their value.
        if self._prompts != library:
            description["chosen_prompts"] = self._prompts
        if self._cut is not None:
            description["dimensions"] = self._cut
        self.fingerprint = _fingerprint(description, [model])
        poolings = [pooling for _, pooling in modules if pooling]
        if self._cut is not None:
            poolings.append(f"first {self._cut} dimensions")
        self.pooling = ", ".join([*poolings, "normalised"] if self._normalise else poolings)
        model.to(DTYPES[dtype])  # converted after the fingerprint, which covers the original weights

    def encode_questions(self, questions: Sequence[str]) -> np.ndarray:
        """Question vectors, float32 ``[n, dimension]``."""
        return self._encode(self._model.encode_query, self._prompts[0], list(questions))

    def encode_passages(self, passages: Sequence[Passage]) -> np.ndarray:
        """Passage vectors, float32 ``[n, dimension]``."""
        texts = [passage.string for passage in passages]
        return self._encode(self._model.encode_document, self._prompts[1], texts)

    def _chosen_prompts(self, options: EncoderOptions, library: tuple[str, str]) -> tuple[str, str]:
        question, passage = options.question_prompt, options.passage_prompt
        known = library
        if not options.library_prompts and (question is None or passage is None):
            # The library takes the passages' prompt by its first name even if only another one has a text.
            passages = filter(None, (self._model.prompts.get(name) for name in PASSAGE_PROMPTS))
            known = library[0], next(passages, library[1])
            if not any(known) and any(known := family_prompts(self.name)):
                _log.warning(
                    "%s has no prompts of its own; where none is given, those of its family are used: %r before "
                    "questions, %r before passages",
                    self.name,
                    *known,
                )
        return known[0] if question is None else question, known[1] if passage is None else passage

    def _encode(self, encode: Callable[..., np.ndarray], prompt: str, texts: list[str]) -> np.ndarray:
        if not texts:
            return np.zeros((0, self.dimension), np.float32)
        # The library sorts by length and restores the order.
        vectors = encode(texts, prompt=prompt, batch_size=self._batch_size, show_progress_bar=False).astype(np.float32)
        if self._cut is not None:
            vectors = np.ascontiguousarray(vectors[:, : self._cut])
        if self._normalise:  # in float32, because half precision has an error of a thousandth
            vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return vectors


def _library_prompts(model: SentenceTransformer) -> tuple[str, str]:
    """The prompts that encode_query and encode_document choose."""
    prompts = {name: prompt or "" for name, prompt in model.prompts.items()}
    default = prompts.get(model.default_prompt_name or "", "")
    passage = next((prompts[name] for name in PASSAGE_PROMPTS if name in prompts), default)
    return prompts.get("query", default), passage


def _passage_length(passage: Passage) -> int:
    return len(passage.title) + len(passage.text)


def _in_batches(
    items: Sequence[Item],
    length: Callable[[Item], int],
    encode: Callable[[Sequence[Item]], np.ndarray],
    batch_size: int,
    dimension: int,
) -> np.ndarray:
    """Encode items of similar length together to reduce padding, and return the vectors in the items' order."""
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
            # It is BERT's tokenizer under another name, but in transformers 5.0 it does not lower-case texts.
            tokenizer = BertTokenizer.from_pretrained(name)
        model = model.to(device).eval()
    # The wrong class loads without an error, with random values for missing weights.
    if missing := report["missing_keys"] or report["mismatched_keys"]:
        raise InputError(f"{name}: not {kind} ({len(missing)} weights missing); are the two encoders in order?")
    return model, tokenizer


@contextmanager
def _loading(name: str, kind: str) -> Iterator[None]:
    """Convert any error to an `InputError`, and silence transformers' table of missing weights."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    except Exception as error:  # the libraries raise errors of a dozen classes for a missing or damaged model
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{name}: cannot be loaded as {kind} ({reason})") from error
    finally:
        transformers_logging.set_verbosity(verbosity)


def _absolute_name(name: str) -> str:
    """The absolute path of a directory, so that an index finds its encoder from any working directory."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def _architecture(model: Any) -> dict[str, Any]:
    """Settings that change a transformer's function without changing the shapes of its weights."""
    config = getattr(model, "config", None)
    return {key: getattr(config, key, None) for key in ("model_type", "num_attention_heads", "hidden_act")}


def _fingerprint(description: Any, models: Sequence[nn.Module]) -> str:
    """SHA-256 of a description and the weights.

    At most 2**20 evenly spaced values of each weight are hashed, so that large models take only seconds. Names and
    order of the weights are ignored, because they change between library versions.
    """
    weights = [sorted(_weight_digest(weight) for weight in model.parameters()) for model in models]
    return hashlib.sha256(json.dumps([description, weights], sort_keys=True).encode()).hexdigest()


def _weight_digest(weight: torch.Tensor) -> str:
    step = max(1, weight.numel() // FINGERPRINT_VALUES)
    values = weight.detach().flatten()[::step].float().cpu().numpy()
    return hashlib.sha256(f"{tuple(weight.shape)}".encode() + values.tobytes()).hexdigest()
