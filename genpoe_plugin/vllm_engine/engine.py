"""Serve requests on vLLM, each with its own experts, and load expert sets when they are needed."""

from __future__ import annotations

import itertools
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import save
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from vllm import LLM, RequestOutput, SamplingParams
from vllm.inputs import TokensPrompt
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind

from genpoe_plugin.checkpoints.checkpoint import load_hypernetwork, read_record, resolve_checkpoint
from genpoe_plugin.errors import InputError
from genpoe_plugin.experts.attention import AttentionExperts
from genpoe_plugin.experts.config import HypernetworkConfig
from genpoe_plugin.experts.hypernetwork import Hypernetwork
from genpoe_plugin.experts.store import ExpertStore
from genpoe_plugin.llm.language_model import load_lower_layers, load_tokenizer
from genpoe_plugin.prompts import cut_passages, tokens_from
from genpoe_plugin.vllm_engine.engine_arguments import check_vllm, engine_arguments, set_bytes
from genpoe_plugin.vllm_engine.expert_sets import SHARED, expert_set, shared_parts

MESSAGE_BYTES = 2**28
"""Largest size of a message with expert sets to the workers; each worker holds a copy meanwhile."""

Key = tuple[tuple[str, ...], tuple[float, ...], int]


@dataclass(frozen=True)
class ExpertRequest:
    """A prompt with its experts.

    Attributes:
        prompt: token ids.
        sampling: vLLM's sampling parameters.
        passages: strings of the passages that become experts, at most the engine's ``num_passages``.
        gates: one gate per passage.
        start: the first position of the prompt that the experts act on.
    """

    prompt: Sequence[int]
    sampling: SamplingParams
    passages: tuple[str, ...] = ()
    gates: tuple[float, ...] = ()
    start: int = 0

    @property
    def key(self) -> Key:
        """The key of the expert set; requests with equal keys share a set."""
        return self.passages, self.gates, self.start


def load_expert_models(
    pretrained: str,
    hypernetwork: str,
    *,
    tokenizer: str | None = None,
    device: str = "cpu",
    dtype: str = "auto",
    revision: str | None = None,
) -> tuple[Hypernetwork, PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the models that generate experts ahead of vLLM.

    Args:
        pretrained: directory or hub id of the LLM.
        hypernetwork: directory or hub id of the hypernetwork.
        tokenizer: tokenizer of the LLM, if it is not in ``pretrained``.
        device: device of the models.
        dtype: dtype of the LLM's layers.
        revision: revision of the LLM.

    Returns:
        The hypernetwork, the layers of the LLM that read passages, and the tokenizer.

    Raises:
        InputError: a model cannot be loaded, the two do not match, or the experts are attention beside an MLP.
    """
    config = HypernetworkConfig.from_dict(read_record(resolve_checkpoint(hypernetwork))["hypernetwork"])
    if config.head == "attention":
        if config.place == "mlp":
            raise InputError(
                f"hypernetwork {hypernetwork} generates experts of tokens beside an MLP, which do not run on vLLM; "
                "use --model genpoe"
            )
        layers = max(config.layers) + 1
    else:
        layers = config.layer + 1 if config.states == "contextual" else 1
    model, depth = load_lower_layers(pretrained, layers, device=device, dtype=dtype, revision=revision)
    loaded_tokenizer = load_tokenizer(tokenizer or pretrained)
    return load_hypernetwork(hypernetwork, model, loaded_tokenizer, depth=depth), model, loaded_tokenizer


@dataclass
class _Loaded:
    """An expert set that the workers have loaded.

    Attributes:
        lora: vLLM's name for it.
        users: number of running requests that use it.
    """

    lora: LoRARequest
    users: int = 0


class ExpertEngine:
    """Serves requests with experts on vLLM, and loads expert sets into the engine as requests need them.

    Args:
        llm: a vLLM engine, started with `engine_arguments`.
        store: the store of experts, in the dtype of ``llm``.
    """

    def __init__(self, llm: LLM, store: ExpertStore) -> None:
        self.llm = llm
        self.store = store
        config = llm.llm_engine.vllm_config
        assert config.lora_config is not None and config.lora_config.max_cpu_loras is not None
        self.capacity: int = config.lora_config.max_cpu_loras
        self.at_once = self.capacity
        if config.parallel_config.pipeline_parallel_size > 1:
            llm.collective_rpc("genpoe_prepare")
            # vLLM's scheduler does not count the adapters of requests that are in another pipeline stage, and fails
            # when more than max_loras of them return. So at most max_loras are in use at a time.
            self.at_once = config.lora_config.max_loras
        self.num_passages: int = config.model_config.hf_config.genpoe["num_passages"]
        set_size = set_bytes(store.config, self.num_passages, store.dtype)
        self._sets_per_message = max(1, MESSAGE_BYTES // set_size)
        self._shared = False
        self._loaded: OrderedDict[Key, _Loaded] = OrderedDict()
        self._numbers = itertools.count(1)
        self._requests = itertools.count()

    @classmethod
    def load(
        cls, pretrained: str, hypernetwork: str, *, num_passages: int = 4, device: str = "cpu", **engine: Any
    ) -> ExpertEngine:
        """Start vLLM with an LLM and a hypernetwork.

        Args:
            pretrained, hypernetwork: directories or hub ids.
            num_passages: largest number of experts per request.
            device: device that generates the experts.
            **engine: engine arguments of ``vllm.LLM``.

        Raises:
            InputError: vLLM is missing or not supported, or models or arguments do not match.
        """
        check_vllm()
        options = {name: engine[name] for name in ("tokenizer", "dtype", "revision") if engine.get(name)}
        models = load_expert_models(pretrained, hypernetwork, device=device, **options)
        arguments = engine_arguments(pretrained, hypernetwork, models[0].config, num_passages, engine)
        llm = LLM(pretrained, **{**engine, **arguments})
        return cls(llm, ExpertStore(*models, dtype=llm.llm_engine.model_config.dtype))

    def request(
        self,
        prompt: str,
        passages: Sequence[str],
        sampling: SamplingParams,
        *,
        gates: Sequence[float] | None = None,
        start: int = 0,
    ) -> ExpertRequest:
        """Create a request from texts.

        Args:
            prompt: the prompt; the tokenizer adds its special tokens.
            passages: passages as ``title: text``; they are cut at 256 tokens.
            sampling: vLLM's sampling parameters.
            gates: one gate per passage; equal by default.
            start: index of the prompt's first character that the experts act on, such as the beginning of the question
                after passages.
        """
        tokenizer = self.store.tokenizer
        ids = tokenizer(prompt)["input_ids"]
        strings = tuple(cut_passages(passages, tokenizer))
        weights = tuple(gates) if gates is not None else (1 / len(strings),) * len(strings) if strings else ()
        begin = len(ids) - tokens_from(prompt, start, tokenizer) if start else 0
        return ExpertRequest(ids, sampling, strings, weights, begin)

    def generate(
        self,
        requests: Sequence[ExpertRequest],
        *,
        progress: bool = True,
        finished: Callable[[int, RequestOutput], None] | None = None,
    ) -> list[RequestOutput]:
        """Generate the outputs of all requests, in their order; expert sets are loaded when they are needed.

        Args:
            requests: the requests.
            progress: whether to show a progress bar.
            finished: called with the index and the output of each request as soon as it is complete.

        Raises:
            InputError: a request has more passages than ``num_passages``, or not one gate per passage.
        """
        for number, request in enumerate(requests):
            if len(request.passages) > self.num_passages:
                raise InputError(
                    f"request {number} has {len(request.passages)} passages, more than num_passages={self.num_passages}"
                )
            if len(request.gates) != len(request.passages):
                raise InputError(f"request {number}: {len(request.gates)} gates for {len(request.passages)} passages")
        present = self.llm.llm_engine.list_loras()
        for key in [key for key, loaded in self._loaded.items() if loaded.lora.lora_int_id not in present]:
            # The adapter was removed by other code; the engine would look for its file and fail.
            del self._loaded[key]
        waiting = deque(enumerate(requests))
        running: dict[str, int] = {}
        outputs: dict[int, RequestOutput] = {}
        engine = self.llm.llm_engine
        bar = tqdm(total=len(requests), desc="Generating", disable=not progress)
        try:
            while waiting or running:
                self._admit(waiting, running)
                for output in engine.step():
                    if output.finished:
                        number = running.pop(output.request_id)
                        outputs[number] = output
                        if requests[number].passages:
                            self._loaded[requests[number].key].users -= 1
                        if finished is not None:
                            finished(number, output)
                        bar.update()
        finally:
            bar.close()
            if running:
                engine.abort_request(list(running))
                for loaded in self._loaded.values():
                    loaded.users = 0
        return [outputs[number] for number in range(len(requests))]

    def _admit(self, waiting: deque[tuple[int, ExpertRequest]], running: dict[str, int]) -> None:
        """Pass waiting requests to vLLM while there is room for their expert sets."""
        room = self.at_once - sum(loaded.users > 0 for loaded in self._loaded.values())
        # Loading interrupts the engine, so many sets are loaded at a time.
        if running and room < max(1, self.at_once // 4):
            return
        admitted, needed = [], {}
        while waiting:
            number, request = waiting[0]
            if request.passages and request.key not in needed:
                loaded = self._loaded.get(request.key)
                if loaded is None or loaded.users == 0:
                    if room == 0:
                        break
                    room -= 1
                needed[request.key] = request
            waiting.popleft()
            admitted.append((number, request))
        self._exchange(needed)
        for number, request in admitted:
            lora = None
            if request.passages:
                loaded = self._loaded[request.key]
                loaded.users += 1
                lora = loaded.lora
            request.sampling.output_kind = RequestOutputKind.FINAL_ONLY
            name = f"genpoe-{next(self._requests)}"
            running[name] = number
            self.llm.llm_engine.add_request(
                name, TokensPrompt(prompt_token_ids=list(request.prompt)), request.sampling, lora_request=lora
            )

    def _exchange(self, needed: dict[Key, ExpertRequest]) -> None:
        """Load missing sets into the workers; they replace the least recently used sets."""
        for key in needed:
            if key in self._loaded:
                self._loaded.move_to_end(key)
        missing = {key: request for key, request in needed.items() if key not in self._loaded}
        if not missing:
            return
        idle = [key for key, loaded in self._loaded.items() if loaded.users == 0 and key not in needed]
        removed = idle[: max(0, len(self._loaded) + len(missing) - self.capacity)]
        numbers = [self._loaded.pop(key).lora.lora_int_id for key in removed]
        requests = list(missing.items())
        for begin in range(0, len(requests), self._sets_per_message):
            tensors: dict[str, torch.Tensor] = {}
            block = requests[begin : begin + self._sets_per_message]
            experts = self.store.experts([request.passages for _, request in block])
            for (key, request), group in zip(block, experts, strict=True):
                number = next(self._numbers)
                # Names are never reused, because the prefix cache identifies an adapter by its name.
                self._loaded[key] = _Loaded(LoRARequest(f"genpoe-{number}", number, "/in/memory"))
                units = self.store.units(request.passages)
                gates = [gate for gate, count in zip(request.gates, units, strict=True) for _ in range(count)]
                parts = expert_set(group, gates, request.start)
                if isinstance(group, AttentionExperts) and not self._shared:
                    tensors |= {f"{SHARED}/{name}": part for name, part in shared_parts(group).items()}
                    self._shared = True
                tensors |= {f"{number}/{name}": part for name, part in parts.items()}
            self.llm.collective_rpc("genpoe_exchange", args=(numbers, save(tensors)))
            numbers = []
