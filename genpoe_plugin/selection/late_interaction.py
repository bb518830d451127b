"""The reranker that is a late-interaction model (ColBERT) of sentence-transformers: a vector per token, and MaxSim."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, cast

import numpy as np
import sentence_transformers
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from genpoe_plugin.errors import InputError
from genpoe_plugin.hub import commit_of, split_revision
from genpoe_plugin.llm.language_model import to_device
from genpoe_plugin.selection.reranking import WINDOW, fingerprint_of


class LateInteractionReranker:
    """Scores (query, passage) pairs by MaxSim: for each token of the query, its best match in the passage; their sum.

    The score is the model's own similarity of the query's and the passage's vectors (Khattab and Zaharia 2020).

    Args:
        model: a ``MultiVectorEncoder``.
        batch_size: texts per forward pass.
        commit: commit of the hub repository that the model was loaded from.
    """

    def __init__(self, model: Any, *, batch_size: int = 32, commit: str | None = None) -> None:
        self.model = model
        self.batch_size = batch_size
        self.commit = commit

    @classmethod
    def load(cls, name: str, *, device: str = "cpu") -> LateInteractionReranker:
        """Load a late-interaction model from a directory or the hub.

        Args:
            name: a directory, or a hub repository as ``user/name`` or ``user/name@revision``.
            device: device of the model.

        Raises:
            InputError: there is no such model or device, or the installed sentence-transformers has no such models.
        """
        if not hasattr(sentence_transformers, "MultiVectorEncoder"):
            raise InputError(f"{name}: a late-interaction model; pip install 'sentence-transformers>=6'")
        repository, revision = split_revision(name)
        try:
            model = sentence_transformers.MultiVectorEncoder(repository, revision=revision, device="cpu")
        except Exception as error:  # each kind of damage to a checkpoint raises another type of error
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(f"{name}: cannot be loaded as a late-interaction model: {reason}") from error
        to_device(cast(PreTrainedModel, model), device)
        return cls(model.eval(), commit=commit_of(repository, revision))

    @torch.inference_mode()
    def score(self, pairs: Sequence[tuple[str, str]], *, progress: bool = False) -> np.ndarray:
        """The score of every (query, passage string) pair, float32 ``[n]``; each distinct text is encoded once."""
        scores = np.empty(len(pairs), dtype=np.float32)
        options = {"batch_size": self.batch_size, "show_progress_bar": False}
        with tqdm(total=len(pairs), desc="reranking", unit="pair", disable=not progress) as bar:
            for start in range(0, len(pairs), WINDOW):
                part = pairs[start : start + WINDOW]
                queries, passages = (list(dict.fromkeys(texts)) for texts in zip(*part, strict=True))
                query = dict(zip(queries, self.model.encode_query(queries, **options), strict=True))
                passage = dict(zip(passages, self.model.encode_document(passages, **options), strict=True))
                found = self.model.similarity_pairwise([query[q] for q, _ in part], [passage[p] for _, p in part])
                scores[start : start + len(part)] = found.float().cpu().numpy()
                bar.update(len(part))
        return scores

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything that decides a score: modules, configuration, vocabulary, prompts and weights."""
        modules = [(type(module).__name__, module.get_config_dict()) for module in self.model]
        settings = [modules, self.model.prompts, str(self.model.similarity_fn_name), self.model.get_max_seq_length()]
        return fingerprint_of(self.model, self.model.transformers_model.config, self.model.tokenizer, settings)
