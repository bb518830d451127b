"""The lm-eval model ``genpoe``: a Hugging Face LLM in the four modes, every row of a batch with its own passages.

Everything before the LLM is `genpoe_plugin.lm.requests`, and `genpoe_plugin.lm.side_channels` brings each batch its
experts. `genpoe_plugin.registration` makes the name known to lm-eval.
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
from transformers import PreTrainedModel

from genpoe_plugin.errors import InputError
from genpoe_plugin.hub import commit_of
from genpoe_plugin.llm.gguf_files import begin_as_stored, check_gguf, gguf_path
from genpoe_plugin.lm.requests import PassageRequests, options
from genpoe_plugin.lm.side_channels import BatchExperts
from genpoe_plugin.provenance import peak_memory
from genpoe_plugin.selection.pipeline import Selection

# HFLM's arguments that say where and how fast and not what, and those that the fingerprint has in another form.
_NO_OPTIONS = (
    *("device", "batch_size", "max_batch_size", "parallelize", "device_map", "max_memory_per_gpu", "max_cpu_memory"),
    *("offload_folder", "use_fast_tokenizer", "trust_remote_code", "logits_cache"),
    *("revision", "peft", "delta", "dtype", "max_length"),
)


class GenPoELM(PassageRequests, HFLM):
    """HFLM with passages in the prompt, as experts, both, or neither.

    Under data parallelism (``accelerate launch``) every process answers its own share of the docs, with the passages
    that it would give them alone.

    Args:
        pretrained: the LLM: a directory, a name on the hub, or a loaded one.
        arguments: those of `GenPoEArguments`, and those of HFLM.

    Raises:
        InputError: arguments that cannot be, or parts that do not fit each other.
    """

    def __init__(self, pretrained: str | PreTrainedModel, **arguments: Any) -> None:
        hf_arguments = self._take_arguments(arguments)
        if isinstance(pretrained, str):
            check_gguf(pretrained, hf_arguments.get("gguf_file"), hf_arguments.get("subfolder") or "")
        super().__init__(pretrained, **hf_arguments)
        if self.world_size == 1 and hasattr(self, "accelerator"):
            # Processes without several GPUs, which HFLM has all do the same work.
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if self.backend != "causal":
            raise InputError(f"{self._llm_name} is not a decoder-only model, which genpoe needs")
        if self.arguments.mode == "genpoe_rag" and self.truncation:
            raise InputError("truncation=True may cut the question off a prompt; leave it out with mode=genpoe_rag")

        self._batch: BatchExperts | None = None
        if self.arguments.uses_experts:
            network = self._checkpoint.load(self.model, self.tokenizer)
            layers = self.arguments.layers_of(network.config)
            # Equal contexts may have different experts, so one's logits cannot serve another.
            self.logits_cache = False
        self._start_requests(self._llm_facts(hf_arguments), str(self.device))
        if self.arguments.uses_experts:
            self.store = self._expert_store(network, self.model, self.tokenizer)
            self._batch = BatchExperts(self.store, self.model, layers)

    def _from_others(self, own: list[Any]) -> list[Any]:
        """What the other processes of a data-parallel run say to this one; all of them call this at the same point."""
        if self.world_size == 1:
            return []
        everyones: list[list[Any]] = [[]] * self.world_size
        torch.distributed.all_gather_object(everyones, own)
        return [item for rank, items in enumerate(everyones) if rank != torch.distributed.get_rank() for item in items]

    def barrier(self) -> None:
        """As HFLM. lm-eval has all processes come here after every type of request: their traces become one file."""
        super().barrier()
        if self.world_size > 1:
            self._documents.join(self.gather_object(self._documents.seen))
            self._trace.join(self.gather_object(self._trace.lines))

    def _create_tokenizer(self, pretrained: str | PreTrainedModel, tokenizer: Any, **options: Any) -> None:
        """As HFLM, and that of a GGUF file begins a text as the file says."""
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
            "options": options(hf_arguments, _NO_OPTIONS),
        }

    # Experts beside the batches

    def _select(self, method: str, requests: Sequence[Instance]) -> list[Selection]:
        selections = super()._select(method, requests)
        if self._batch is not None:
            self._batch.foresee(selections)
        return selections

    def tok_batch_encode(self, strings: Any, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """As HFLM, which is about to generate from these prompts: their experts are made ready."""
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
            return super()._model_generate(context, *args, **kwargs)

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        with self._injected(inps):
            return super()._model_call(inps, *args, **kwargs)

    def _detect_batch_size(self, requests: Sequence[Any] | None = None, pos: int = 0) -> int:
        """As HFLM, with as many experts in every row as the run will see."""
        with nullcontext() if self._batch is None else self._batch.probing():
            return super()._detect_batch_size(requests, pos)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """As HFLM, which is handed one batch at a time, in the order in which it would sort them itself."""
        if self._batch is None:
            return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)

        def key(number: int) -> tuple[int, tuple[int, ...]]:
            _, context, continuation = requests[number]
            return -len(context) - len(continuation), tuple(context + continuation)

        owners = [self._scored_row(request) for request in requests]
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
        hidden = disable_tqdm or self.rank != 0
        with tqdm(total=len(requests), desc="Running loglikelihood requests", disable=hidden) as bar:
            for batch in batches:
                numbers = order[len(results) : len(results) + len(batch)]
                tokens = [(row[1] + row[2])[-(self.max_length + 1) :][:-1] for row in batch]
                self._batch.prepare([owners[number] for number in numbers], tokens)
                scores = super()._loglikelihood_tokens(batch, disable_tqdm=True, override_bs=len(batch))
                results.update(zip(numbers, scores, strict=True))
                bar.update(len(batch))
        return [results[number] for number in range(len(requests))]
