"""The lm-eval model ``genpoe``: an LLM on transformers in the four modes; each row of a batch has its own passages.

`genpoe_plugin.lm.requests` prepares the requests, `genpoe_plugin.lm.side_channels` assigns each batch its experts, and
`genpoe_plugin.registration` registers the model with lm-eval.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import Collator
from tqdm import tqdm
from transformers import LogitsProcessorList, PreTrainedModel

from genpoe_plugin.errors import InputError
from genpoe_plugin.hub import commit_of
from genpoe_plugin.llm.gguf_files import begin_as_stored, check_gguf, gguf_path
from genpoe_plugin.llm.language_model import loading
from genpoe_plugin.lm.first_token import FirstTokenClock
from genpoe_plugin.lm.requests import PassageRequests, options
from genpoe_plugin.lm.side_channels import BatchExperts
from genpoe_plugin.provenance import peak_memory
from genpoe_plugin.selection.pipeline import Selection

# HFLM's arguments that do not change an answer, and those that the fingerprint contains in another form.
_NOT_IN_OPTIONS = (
    *("device", "batch_size", "max_batch_size", "parallelize", "device_map", "max_memory_per_gpu", "max_cpu_memory"),
    *("offload_folder", "use_fast_tokenizer", "trust_remote_code", "logits_cache"),
    *("revision", "peft", "delta", "dtype", "max_length"),
)


class GenPoELM(PassageRequests, HFLM):
    """lm-eval's model class for transformers, HFLM, with passages in the prompt, as experts, both, or neither.

    With data parallelism (``accelerate launch``), each process answers a part of the docs; passages are the same as
    with a single process.

    Args:
        pretrained: the LLM: a directory, a hub name, or a loaded model.
        **arguments: the fields of `GenPoEArguments`, and HFLM's arguments.

    Raises:
        InputError: an argument is invalid, or models do not match.
    """

    def __init__(self, pretrained: str | PreTrainedModel, **arguments: Any) -> None:
        hf_arguments = self._take_arguments(arguments)
        if isinstance(pretrained, str):
            check_gguf(pretrained, hf_arguments.get("gguf_file"), hf_arguments.get("subfolder") or "")
        super().__init__(pretrained, **hf_arguments)
        if self.world_size == 1 and hasattr(self, "accelerator"):
            # Without several GPUs, HFLM would make all processes do the same work.
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if self.backend != "causal":
            raise InputError(f"{self._llm_name} is not a decoder-only model, which genpoe needs")
        if self.arguments.mode == "genpoe_rag" and self.truncation:
            raise InputError("truncation=True may cut the question off a prompt; leave it out with mode=genpoe_rag")

        self._clock = FirstTokenClock()
        self._batch: BatchExperts | None = None
        if self.arguments.uses_experts:
            network = self._checkpoint.load(self.model, self.tokenizer)
            layers = self.arguments.layers_of(network.config)
            # Equal contexts may have different experts, so their logits cannot be shared.
            self.logits_cache = False
        self._start_requests(self._llm_facts(hf_arguments), str(self.device))
        if self.arguments.uses_experts:
            self.store = self._expert_store(network, self.model, self.tokenizer)
            self._batch = BatchExperts(self.store, self.model, layers)

    def _from_others(self, own_items: list[Any]) -> list[Any]:
        if self.world_size == 1:
            return []
        items_of: list[list[Any]] = [[]] * self.world_size
        torch.distributed.all_gather_object(items_of, own_items)
        return [item for rank, items in enumerate(items_of) if rank != torch.distributed.get_rank() for item in items]

    def barrier(self) -> None:
        """Merge the traces of all processes; lm-eval calls this in each of them after every type of request."""
        super().barrier()
        if self.world_size > 1:
            self._documents.join(self.gather_object(self._documents.seen))
            self._trace.join(self.gather_object(self._trace.lines))

    def _get_config(self, pretrained: str, **options: Any) -> None:
        with loading(pretrained):
            super()._get_config(pretrained, **options)

    def _create_model(self, pretrained: str, **options: Any) -> None:
        with loading(pretrained):
            super()._create_model(pretrained, **options)

    def _create_tokenizer(self, pretrained: str | PreTrainedModel, tokenizer: Any, **options: Any) -> None:
        """Create the tokenizer as HFLM does; a GGUF file decides whether it adds BOS."""
        with loading(str(pretrained if isinstance(pretrained, str) else pretrained.name_or_path)):
            super()._create_tokenizer(pretrained, tokenizer, **options)
        if options.get("gguf_file") is not None and not tokenizer and isinstance(pretrained, str):
            revision, subfolder = options.get("revision"), options.get("subfolder") or ""
            path = gguf_path(pretrained, options["gguf_file"], revision=revision, subfolder=subfolder)
            begin_as_stored(self.tokenizer, path)

    @property
    def _llm_name(self) -> str:
        return self.pretrained if isinstance(self.pretrained, str) else self.pretrained.name_or_path

    @property
    def _scored_length(self) -> int:
        return self.max_length + 1  # the last token is not read

    @property
    def _window_length(self) -> int:
        return self.max_length

    def _peak_memory(self) -> dict[str, Any]:
        return peak_memory(self.device)

    def _first_token_seconds(self) -> float | None:
        return self._clock.mean

    def _llm_facts(self, hf_arguments: dict[str, Any]) -> dict[str, Any]:
        commit = commit_of(self.pretrained, self.revision) if isinstance(self.pretrained, str) else None
        return {
            "pretrained": self._llm_name,
            "revision": self.revision,
            **({} if commit is None else {"commit": commit}),
            "peft": self.peft,
            "delta": self.delta,
            "dtype": str(self.model.dtype),
            "max_length": self.max_length,
            "options": options(hf_arguments, _NOT_IN_OPTIONS),
        }

    # Experts of the batches

    def _select(self, method: str, requests: Sequence[Instance]) -> list[Selection]:
        selections = super()._select(method, requests)
        if self._batch is not None:
            self._batch.foresee(selections)
        return selections

    def tok_batch_encode(self, strings: Any, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode prompts as HFLM does, and prepare their experts; HFLM generates from these prompts next."""
        self._clock.start()
        ids, mask = super().tok_batch_encode(strings, *args, **kwargs)
        if self._batch is not None:
            lengths = mask.sum(1).tolist()
            self._batch.prepare(
                [
                    (context.selection, self._start(context, context, length))
                    for context, length in zip(strings, lengths, strict=True)
                ]
            )
        return ids, mask

    def _injected(self, ids: torch.Tensor) -> AbstractContextManager[None]:
        return nullcontext() if self._batch is None else self._batch.injected(ids)

    def _model_generate(self, context: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        with self._injected(context):
            processors = LogitsProcessorList([self._clock])
            return super()._model_generate(context, *args, logits_processor=processors, **kwargs)

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        with self._injected(inps):
            return super()._model_call(inps, *args, **kwargs)

    def _detect_batch_size(self, requests: Sequence[Any] | None = None, pos: int = 0) -> int:
        """Search for the largest batch size as HFLM does, with the run's largest number of experts in every row."""
        with nullcontext() if self._batch is None else self._batch.probing():
            return super()._detect_batch_size(requests, pos)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Score requests with HFLM, one batch at a time; batches and their order are those of HFLM itself."""
        if self._batch is None:
            return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)

        def key(number: int) -> tuple[int, tuple[int, ...]]:
            _, context, continuation = requests[number]
            return -len(context) - len(continuation), tuple(context + continuation)

        rows = [self._scored_row(request) for request in requests]
        order = sorted(range(len(requests)), key=key)
        detect = self.batch_size == "auto" and not override_bs
        if detect:
            self.batch_sizes: dict[int, int] = {}
        batches = Collator.get_chunks(
            (requests[number] for number in order),
            n=override_bs if self.batch_size == "auto" else self.batch_size,
            fn=self._batch_scheduler if detect else None,
        )
        results: dict[int, tuple[float, bool]] = {}
        hide_bar = disable_tqdm or self.rank != 0
        with tqdm(total=len(requests), desc="Running loglikelihood requests", disable=hide_bar) as bar:
            for batch in batches:
                numbers = order[len(results) : len(results) + len(batch)]
                tokens = [(context + target)[-(self.max_length + 1) :][:-1] for _, context, target in batch]
                self._batch.prepare([rows[number] for number in numbers], tokens)
                scores = super()._loglikelihood_tokens(batch, disable_tqdm=True, override_bs=len(batch))
                results.update(zip(numbers, scores, strict=True))
                bar.update(len(batch))
        return [results[number] for number in range(len(requests))]
