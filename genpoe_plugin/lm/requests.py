"""The common part of our lm-eval model classes: select passages, generate experts and build prompts.

A model class receives all requests of a run at once. It selects the passages of all of them, generates their experts,
and inserts passages into prompts. Batching, generating and scoring are left to the class of lm-eval that it extends.
`genpoe_plugin.lm.side_channels` assigns the experts to the rows of its batches.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook, TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, hash_string, simple_parse_args_string
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from genpoe_plugin import __version__
from genpoe_plugin.arguments import ARGUMENTS, GenPoEArguments
from genpoe_plugin.checkpoints.checkpoint import HypernetworkCheckpoint, llm_identity
from genpoe_plugin.data.questions import Question, passages_from_ctxs
from genpoe_plugin.errors import InputError
from genpoe_plugin.experts.expert_files import FORMAT, ExpertFiles
from genpoe_plugin.experts.hypernetwork import Hypernetwork
from genpoe_plugin.experts.store import ExpertStore
from genpoe_plugin.llm.language_model import weights_sample
from genpoe_plugin.lm import response_cache
from genpoe_plugin.lm.argument_names import check_names, nearest_name
from genpoe_plugin.lm.saved_results import RunFacts, save_traces
from genpoe_plugin.lm.side_channels import OriginalKeys, PlacedContext, Row, Windows
from genpoe_plugin.prompts import PROMPT_MODES, expert_start, in_mode, last_question
from genpoe_plugin.provenance import DocumentDigests, digest, provenance
from genpoe_plugin.registration import errors_in_one_line
from genpoe_plugin.selection.pipeline import Pipeline, Selection
from genpoe_plugin.selection.timing import timed
from genpoe_plugin.selection.trace import Trace

_log = logging.getLogger(__name__)

errors_in_one_line()  # needed if lm-eval finds the model classes without the start-up file


def options(arguments: Mapping[str, Any], without: Collection[str]) -> dict[str, Any]:
    """The arguments of lm-eval's own class that may change an answer, for the fingerprint.

    Args:
        arguments: all arguments of that class.
        without: names to leave out.
    """
    return {
        name: value for name, value in arguments.items() if name not in without and isinstance(value, str | int | float)
    }


class PassageRequests(TemplateLM):
    """A mixin for model classes of lm-eval, which prepares requests and records results.

    The constructor of the model class calls `_take_arguments`, loads the LLM, and calls `_start_requests` and, in modes
    with experts, `_expert_store`. The class also implements `_llm_name`, `_scored_length`, `_window_length` and
    `_peak_memory`, and adds the experts to the LLM's forward passes.
    """

    arguments: GenPoEArguments
    store: ExpertStore | None
    cache_hook: CacheHook

    def _take_arguments(self, model_arguments: dict[str, Any]) -> dict[str, Any]:
        """Check and store the model arguments that are ours, and return the others.

        Raises:
            InputError: an argument is invalid.
        """
        self.store = None
        self.arguments = GenPoEArguments(
            **{name: value for name, value in model_arguments.items() if name in ARGUMENTS}
        )
        return {name: value for name, value in model_arguments.items() if name not in ARGUMENTS}

    def _start_requests(self, llm_facts: dict[str, Any], device: str) -> None:
        """Load the retriever and the reranker, and prepare for requests.

        Args:
            llm_facts: entries of the fingerprint about the LLM.
            device: device of retriever and reranker.

        Raises:
            InputError: the LLM's tokenizer is not a fast one, or a model cannot be loaded.
        """
        if self.arguments.control != "none" and not self.tokenizer.is_fast:
            raise InputError(
                f"the tokenizer of {self._llm_name} has no character offsets; genpoe needs a fast tokenizer"
            )
        self.pipeline = self._load_pipeline(device)
        self.fingerprint = self._fingerprint(llm_facts)
        self.seconds = {"experts": 0.0, "generate": 0.0}
        self._expert_bytes: dict[tuple[Any, ...], int] = {}  # of every question, by task and doc
        self._documents = DocumentDigests()
        self._trace = Trace(self.arguments.trace, self.rank)
        save_traces()
        self._windows = Windows()

    @property
    def _llm_name(self) -> str:
        raise NotImplementedError

    @property
    def _scored_length(self) -> int:
        """Largest number of tokens of a context with its continuation."""
        raise NotImplementedError

    @property
    def _window_length(self) -> int:
        """Number of tokens of a window of a rolling log-likelihood."""
        raise NotImplementedError

    def _peak_memory(self) -> dict[str, Any] | None:
        """The peak memory of the run, as in `genpoe_plugin.provenance`; None if it is unknown."""
        raise NotImplementedError

    def _first_token_seconds(self) -> float | None:
        """Mean seconds from the start of a batch, with its experts made, to its first new token; None if unknown."""
        return None

    def _from_others(self, own_items: list[Any]) -> list[Any]:
        """Exchange items with the other processes of a data-parallel run; all of them must call this together.

        Args:
            own_items: items of this process.

        Returns:
            The items of all other processes, in the order of their ranks.
        """
        return []

    @cached_property
    def _checkpoint(self) -> HypernetworkCheckpoint:
        """The hypernetwork's checkpoint; it is resolved only once, because a branch on the hub may change."""
        assert self.arguments.hypernetwork is not None
        return HypernetworkCheckpoint.from_pretrained(self.arguments.hypernetwork)

    def _expert_store(
        self,
        network: Hypernetwork,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        dtype: torch.dtype | None = None,
    ) -> ExpertStore:
        """Create the store of experts.

        Args:
            network: hypernetwork that generates the experts.
            model: LLM whose states the hypernetwork reads.
            tokenizer: tokenizer of the LLM.
            dtype: dtype of the experts if the user gives none; by default that of ``model``.
        """
        arguments, files = self.arguments, None
        if arguments.expert_dtype is not None:
            dtype = getattr(torch, arguments.expert_dtype)
        if arguments.expert_store is not None:
            # Stored experts are used again only with the same checkpoint, LLM and precision.
            names = ("pretrained", "revision", "peft", "delta", "dtype", "options", "hypernetwork")
            facts = {name: self.fingerprint.get(name) for name in names}
            if arguments.expert_dtype is not None:
                facts["expert_dtype"] = arguments.expert_dtype
            content = json.dumps([FORMAT, llm_identity(model), weights_sample(model), facts])
            files = ExpertFiles(arguments.expert_store, hashlib.sha256(content.encode()).hexdigest()[:16])
        return ExpertStore(
            network, model, tokenizer, dtype=dtype, device_bytes=int(arguments.expert_gb * 10**9), files=files
        )

    def _load_pipeline(self, device: str) -> Pipeline:
        arguments = self.arguments
        retriever = reranker = None
        # Imported here because faiss and the encoders take seconds, and most modes and controls do not need them.
        if arguments.needs_index:
            from genpoe_plugin.retrieval.loading import load_retriever

            retriever = load_retriever(str(arguments.index), device=device)
        if arguments.needs_reranker:
            from genpoe_plugin.selection.rerankers import load_reranker

            reranker = load_reranker(str(arguments.reranker), format=arguments.reranker_format, device=device)
        return Pipeline(
            self.tokenizer,
            retriever,
            reranker,
            num_retrieved=arguments.num_retrieved,
            num_passages=arguments.num_passages,
            gates=arguments.gates,
            gate_temperature=arguments.gate_temperature,
            control=arguments.control,
            seed=arguments.seed,
            progress=self.rank == 0,
            from_others=self._from_others,
        )

    def _fingerprint(self, llm_facts: dict[str, Any]) -> dict[str, Any]:
        """Everything that may change an answer, except the request and its doc.

        Args:
            llm_facts: entries about the LLM.
        """
        arguments, pipeline = self.arguments, self.pipeline
        loaded = {
            "hypernetwork": self._checkpoint if arguments.uses_experts else None,
            "index": pipeline.retriever,
            "reranker": pipeline.reranker,
        }
        facts = {"version": __version__, **llm_facts}
        facts |= arguments.fingerprint({name: part and part.fingerprint for name, part in loaded.items()})
        commits = {f"{name}_commit": getattr(part, "commit", None) for name, part in loaded.items()}
        return facts | {name: commit for name, commit in commits.items() if commit is not None}

    def get_model_info(self) -> dict[str, Any]:
        """Information about the model for lm-eval's results.

        The entry ``genpoe`` contains the arguments, fingerprint, provenance and costs of the run. With data
        parallelism, the numbers of questions and seconds are those of this process.
        """
        seconds, questions = self.pipeline.seconds | self.seconds, len(self._expert_bytes)
        busy = seconds["experts"] + seconds["generate"]
        # lm-eval's vLLM class has no such method.
        llm: dict[str, Any] = getattr(super(), "get_model_info", dict)()
        facts = {
            "arguments": asdict(self.arguments),
            "fingerprint": self.fingerprint,
            "settings": digest(self.fingerprint),
            "documents": self._documents.by_task(),
            "provenance": provenance(),
            "peak_memory": self._peak_memory(),
            "questions": questions,
            "seconds": {stage: round(value, 3) for stage, value in seconds.items()},
            "questions_per_second": round(questions / busy, 3) if busy else None,
            "first_token_seconds": self._first_token_seconds(),
            "expert_bytes": sum(self._expert_bytes.values()) if self.store is not None else None,
        }
        return llm | {"genpoe": RunFacts(facts, None if self.arguments.trace else self._trace)}

    # Creation by lm-eval

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> Any:
        """Create the model from arguments as a string; see `create_from_arg_obj`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> Any:
        """Create the model from its arguments and the values of lm_eval's options.

        Raises:
            InputError: the arguments name no LLM, or one of them is unknown or also an option of lm_eval.
        """
        check_names(cls, arg_dict, additional_config or {})
        try:
            return super().create_from_arg_obj(arg_dict, additional_config)
        except TypeError as error:
            match = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if match is None or match[1] not in arg_dict:
                raise
            name = match[1]
            nearest = nearest_name(cls, name)
            raise InputError(
                f"{name}={arg_dict[name]}: not an argument of this model or of the LLM"
                + (f"; did you mean {nearest}?" if nearest else "")
            ) from error

    # Requests of lm-eval

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        if not requests:  # lm-eval's vLLM class expects at least one request
            return []
        selections = self._select("generate_until", requests)
        with timed(self.seconds, "generate"):
            placed = [
                self._with_context(request, self._place_to_generate(request, selection))
                for request, selection in zip(requests, selections, strict=True)
            ]
        self._trace_requests(requests, selections, placed)
        with timed(self.seconds, "generate"):
            return self._generate_placed(placed, disable_tqdm)

    def _generate_placed(self, requests: list[Instance], disable_tqdm: bool) -> list[str]:
        """Generate from prompts that are `PlacedContext`; by default with lm-eval's own class."""
        return super().generate_until(requests, disable_tqdm=disable_tqdm)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        selections = self._select("loglikelihood", requests)
        with timed(self.seconds, "generate"):
            longest = self._longest_continuations(requests)
            placed = [
                self._with_context(
                    request, self._place_to_score(request, selection, longest[self._sample_key(request)])
                )
                for request, selection in zip(requests, selections, strict=True)
            ]
        self._trace_requests(requests, selections, placed)
        with timed(self.seconds, "generate"):
            return super().loglikelihood(placed, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Score whole texts; experts act on every window from its first token. No passages are added to the text."""
        selections = self._select("loglikelihood_rolling", requests)
        self._trace_requests(requests, selections, requests)
        with timed(self.seconds, "generate"):
            if self.arguments.mode in PROMPT_MODES and any(selection.strings for selection in selections):
                _log.warning("loglikelihood_rolling scores the text alone: no passages are added to it")
            if self.store is not None:
                self._windows = Windows(
                    selection
                    for request, selection in zip(requests, selections, strict=True)
                    for _ in get_rolling_token_windows(
                        self.tok_encode(request.args[0]), self.prefix_token_id, self._window_length, 1
                    )
                )
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)

    # Passages and experts of all requests

    def _select(self, method: str, requests: Sequence[Instance]) -> list[Selection]:
        """Select the passages of all requests and generate their experts."""
        questions = [self._question(request) for request in requests]
        if self.cache_hook.dbdict is not None:
            response_cache.guard_passages(
                self.cache_hook.dbdict, method, requests, questions, self.arguments.num_retrieved
            )
        selections = self.pipeline.select([request.task_name or "" for request in requests], questions)
        self._documents.add(requests)
        if self.store is not None:
            with timed(self.seconds, "experts"):
                strings = (string for selection in selections for string in selection.strings)
                self.store.prepare(strings, progress=self.rank == 0)
        for request, selection in zip(requests, selections, strict=True):
            size = 0 if self.store is None else self.store.nbytes(selection.strings)
            self._expert_bytes[self._sample_key(request)[:2]] = size
        return selections

    def _trace_requests(
        self, requests: Sequence[Instance], selections: Sequence[Selection], placed: Sequence[Instance]
    ) -> None:
        """Write the trace of requests before the LLM runs, and store its lines in the response cache.

        If the run is interrupted and resumed, requests whose answers are in the cache do not reach the model again.

        Args:
            requests: the requests of the tasks.
            selections: the selection of each request.
            placed: the requests for the LLM, with passages in their prompts.
        """
        facts = {
            "mode": self.arguments.mode,
            "control": self.arguments.control,
            "retriever": None if self.pipeline.retriever is None else self.pipeline.retriever.name,
            "hypernetwork": self.fingerprint.get("hypernetwork"),
            "settings": digest(self.fingerprint),
        }
        lines: dict[tuple[Any, ...], str] = {}
        for request, selection, llm_request in zip(requests, selections, placed, strict=True):
            # The same name and value as in lm-eval's sample log.
            prompt_hash = hash_string(request.args[0])
            prompt = str(llm_request.args[0])
            line = self._trace.add(request.doc_id, selection, **facts, prompt_hash=prompt_hash, prompt=prompt)
            lines[request.task_name, request.doc_id, prompt_hash] = line
        self._trace.write()
        if self.cache_hook.dbdict is not None:
            response_cache.keep_trace(self.cache_hook.dbdict, lines)

    def _question(self, request: Instance) -> Question:
        """The question of a request, with the answers and passages of its doc."""
        doc = request.doc if isinstance(request.doc, dict) else {}
        text = doc.get(self.arguments.question_field)
        if not (isinstance(text, str) and text.strip()):
            text = last_question(request.args[0], self.tokenizer.bos_token)
        if self.arguments.control == "none":
            return Question(text, ())
        ctxs = doc.get("ctxs") or ()
        where = f'task {request.task_name}, doc {request.doc_id}, "ctxs"'
        return Question(text, _answers(doc), passages_from_ctxs(ctxs, where))

    @staticmethod
    def _sample_key(request: Instance) -> tuple[Any, ...]:
        """A key that all requests of one sample share, such as the choices of a doc."""
        return request.task_name, request.doc_id, request.args[0]

    # Passages in prompts

    @staticmethod
    def _with_context(request: Instance, context: PlacedContext) -> Instance:
        """A copy of a request with another context; lm-eval needs the original unchanged."""
        return replace(request, arguments=(context, *request.args[1:]))

    def _place(self, context: str, selection: Selection, fits: Callable[[str], bool]) -> PlacedContext:
        question, mode = selection.question.question, self.arguments.mode
        prompt = in_mode(mode, context, question, selection.strings, fits=fits, bos=self.tokenizer.bos_token)
        return PlacedContext(prompt, context, selection)

    def _place_to_generate(self, request: Instance, selection: Selection) -> PlacedContext:
        context, gen_kwargs = request.args

        def fits(prompt: str) -> bool:
            new_tokens = normalize_gen_kwargs(gen_kwargs, self.max_gen_toks)["max_gen_toks"]
            return len(self.tok_encode(prompt)) <= self.max_length - new_tokens

        return self._place(context, selection, fits)

    def _place_to_score(self, request: Instance, selection: Selection, longest: str) -> PlacedContext:
        """Build the prompt of a choice; all choices of a doc get as many passages as fit with the longest choice."""

        def fits(prompt: str) -> bool:
            return sum(map(len, self._encode_pair(prompt, longest))) <= self._scored_length

        return self._place(request.args[0], selection, fits)

    def _longest_continuations(self, requests: Sequence[Instance]) -> dict[tuple[Any, ...], str]:
        continuations: defaultdict[tuple[Any, ...], list[str]] = defaultdict(list)
        for request in requests:
            continuations[self._sample_key(request)].append(request.args[1])
        return {
            sample: max(choices, key=lambda choice: len(self.tok_encode(choice, add_special_tokens=False)))
            for sample, choices in continuations.items()
        }

    # Experts of each row

    def _start(self, context: PlacedContext, text: str, tokens: int) -> int:
        """The index of the first token that the experts act on; see `expert_start` for ``text`` and ``tokens``."""
        return expert_start(context.question_at, text, tokens, self.tokenizer)

    def _scored_row(self, request: tuple[Any, list[int], list[int]]) -> Row:
        """The selection of a scored row, and the first token of the LLM's input that its experts act on."""
        strings, context, continuation = request
        if strings is None:
            return self._windows.next(), 0
        cut = max(0, len(context) + len(continuation) - self._scored_length)
        # lm-eval moves white space at the end of a context to the continuation.
        start = self._start(strings[0], strings[0].rstrip(), len(context) - cut)
        return strings[0].selection, start

    # The response cache

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Use lm-eval's response cache if it was filled by this model with the same arguments.

        Raises:
            InputError: another model or other arguments filled the cache; or the passages of a question depend on the
                other questions of the run, and a cache would hide some of them.
        """
        answers = cache_hook.dbdict
        if answers is not None:
            if self.arguments.mixes_rows:
                raise InputError(
                    f"--use_cache does not work with passages={self.arguments.passages}, because the passages of a "
                    "question depend on the other questions of the run; leave --use_cache out"
                )
            response_cache.open_cache(answers, self.fingerprint)
            self._trace.keep(response_cache.traced(answers))
        super().set_cache_hook(OriginalKeys(cache_hook))


def _answers(doc: dict[str, Any]) -> tuple[str, ...]:
    """The accepted answers of a doc, from a list of strings, one string, or TriviaQA's ``{"aliases": [...]}``."""
    answers = doc.get("answers", doc.get("answer"))
    if isinstance(answers, dict):
        answers = answers.get("aliases")
    if isinstance(answers, str):
        answers = [answers]
    if not isinstance(answers, list | tuple):
        return ()
    return tuple(answer for answer in answers if isinstance(answer, str))
