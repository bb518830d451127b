"""The reranker that is a cross-encoder of sentence-transformers: an encoder or a decoder with one score per pair."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import cast

import numpy as np
from sentence_transformers import CrossEncoder
from sentence_transformers.base.modules import Module
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from genpoe_plugin.errors import InputError
from genpoe_plugin.hub import commit_of, split_revision
from genpoe_plugin.llm.language_model import to_device
from genpoe_plugin.selection.reranking import fingerprint_of


class CrossEncoderReranker:
    """Scores (query, passage) pairs by the output of a CrossEncoder, without the activation function after it.

    Without a sigmoid, the scores are logits like those of a decoder LLM, whose softmax makes gates.

    Args:
        model: the cross-encoder.
        batch_size: pairs per forward pass.
        commit: commit of the hub repository that the cross-encoder was loaded from.
    """

    def __init__(self, model: CrossEncoder, *, batch_size: int = 32, commit: str | None = None) -> None:
        self.model = model
        self.batch_size = batch_size
        self.commit = commit

    @classmethod
    def load(
        cls,
        name: str,
        *,
        device: str = "cpu",
        dtype: str = "auto",
        batch_size: int = 32,
        trust_remote_code: bool = False,
    ) -> CrossEncoderReranker:
        """Load a cross-encoder from a directory or the hub.

        Args:
            name: a directory, or a hub repository as ``user/name`` or ``user/name@revision``.
            device: device of the model.
            dtype: dtype of the weights; ``auto`` keeps that of the checkpoint.
            batch_size: pairs per forward pass.
            trust_remote_code: whether to run code from the repository.

        Raises:
            InputError: there is no such model or device, or the model has several scores per pair.
        """
        repository, revision = split_revision(name)
        try:
            model = CrossEncoder(
                repository,
                revision=revision,
                device="cpu",
                model_kwargs={"dtype": dtype},
                trust_remote_code=trust_remote_code,
            )
            # Fails if a decoder's chat template has no place for the texts, or if its model has no padding token.
            model.predict([("a query", "a passage"), ("query", "passage")])
        except Exception as error:  # each kind of damage to a checkpoint raises another type of error
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(f"{name}: cannot be loaded as a cross-encoder: {reason}") from error
        if model.num_labels != 1:
            raise InputError(f"{name}: {model.num_labels} scores of each pair instead of one; give a reranker")
        to_device(cast(PreTrainedModel, model), device)
        return cls(model.eval(), batch_size=batch_size, commit=commit_of(repository, revision))

    def score(self, pairs: Sequence[tuple[str, str]], *, progress: bool = False) -> np.ndarray:
        """The score of every (query, passage string) pair, float32 ``[n]``; higher is more relevant."""
        # The library sorts pairs by length and restores the order.
        scores = self.model.predict(
            list(pairs), batch_size=self.batch_size, activation_fn=nn.Identity(), show_progress_bar=progress
        )
        return np.asarray(scores, np.float32).reshape(len(pairs))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything that decides a score: modules, configuration, vocabulary, prompts and weights."""
        modules = [(type(module).__name__, cast(Module, module).get_config_dict()) for module in self.model]
        model, tokenizer = cast(PreTrainedModel, self.model.model), cast(PreTrainedTokenizerBase, self.model.tokenizer)
        prompts = [self.model.prompts, self.model.default_prompt_name, tokenizer.chat_template]
        return fingerprint_of(self.model, model.config, tokenizer, [modules, self.model.max_seq_length, *prompts])
