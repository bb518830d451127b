"""What the lm-eval model classes share: passages chosen for all requests at once, and put where the LLM reads them.

Such a class sees all requests of a run at once. It selects passages and makes experts for all of them, puts passages
into the prompts that need them, and leaves batching, generating and scoring to the class of lm-eval that it builds on.
How each row finds its experts there is `genpoe_plugin.lm.side_channels`.
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

errors_in_one_line()  # also where lm-eval finds the model classes by itself, and the start-up file is off


def options(arguments: Mapping[str, Any], without: Collection[str]) -> dict[str, Any]:
    """Arguments of lm-eval's own class that may decide an answer, for the fingerprint."""
    return {
        name: value for name, value in arguments.items() if name not in without and isinstance(value, str | int | float)
    }


class PassageRequests(TemplateLM):
    """A part of an lm-eval model class: what happens to requests before and after the LLM.

    The class that it is mixed into calls `_take_arguments`, loads the LLM, then calls `_start_requests`, and where
    there are to be experts `_expert_store`. It says with `_llm_name`, `_scored_length`, `_window_length` and
    `_peak_memory` what it loaded, and brings experts to the rows.
    """

    arguments: GenPoEArguments
    store: ExpertStore | None
    cache_hook: CacheHook

    def _take_arguments(self, given: dict[str, Any]) -> dict[str, Any]:
        """Check what of the model arguments is ours; returns the others.

        Raises:
            InputError: arguments that cannot be.
        """
        self.store = None
        self.arguments = GenPoEArguments(**{name: value for name, value in given.items() if name in ARGUMENTS})
        return {name: value for name, value in given.items() if name not in ARGUMENTS}

    def _start_requests(self, llm: dict[str, Any], device: str) -> None:
        """Load what comes before the LLM, onto ``device``; ``llm`` is what the fingerprint has to say of the LLM."""
        if self.arguments.control != "none" and not self.tokenizer.is_fast:
            raise InputError(f"the tokenizer of {self._llm_name} gives no token offsets; genpoe needs a fast tokenizer")
        self.pipeline = self._load_pipeline(device)
        self.fingerprint = self._fingerprint(llm)
        self.seconds = {"experts": 0.0, "generate": 0.0}
        self._questions: set[tuple[Any, ...]] = set()
        self._documents = DocumentDigests()
        self._trace = Trace(self.arguments.trace, self.rank)
        save_traces()
        self._windows = Windows()

    @property
    def _llm_name(self) -> str:
        raise NotImplementedError

    @property
    def _scored_length(self) -> int:
        """At most how many tokens a context and its continuation have together."""
        raise NotImplementedError

    @property
    def _window_length(self) -> int:
        """Tokens of a window of a rolling text."""
        raise NotImplementedError

    def _peak_memory(self) -> dict[str, Any] | None:
        """The most memory that the run took, as `genpoe_plugin.provenance` says it, where that is known."""
        raise NotImplementedError

    def _from_others(self, own: list[Any]) -> list[Any]:
        """What the other processes of a data-parallel run say to this one."""
        return []

    @cached_property
    def _checkpoint(self) -> HypernetworkCheckpoint:
        """The hypernetwork's, found once: a branch of the hub may move meanwhile."""
        assert self.arguments.hypernetwork is not None
        return HypernetworkCheckpoint.from_pretrained(self.arguments.hypernetwork)

    def _expert_store(
        self,
        network: Hypernetwork,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        dtype: torch.dtype | None = None,
    ) -> ExpertStore:
        """What keeps the experts of ``network``, in ``dtype`` or that of ``model``, whose states it reads."""
        arguments, files = self.arguments, None
        if arguments.expert_dtype is not None:
            dtype = getattr(torch, arguments.expert_dtype)
        if arguments.expert_store is not None:
            # Those that this checkpoint made of this LLM's states, in this precision.
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
        # Imported here because faiss and the encoders take seconds, and most modes and controls do without.
        if arguments.needs_index:
            from genpoe_plugin.retrieval.retriever import Retriever

            retriever = Retriever.load(str(arguments.index), device=device)
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

    def _fingerprint(self, llm: dict[str, Any]) -> dict[str, Any]:
        """Everything that decides an answer besides the request itself and what its doc brings along.

        ``llm`` is what there is to say of the LLM.
        """
        arguments, pipeline = self.arguments, self.pipeline
        loaded = {
            "hypernetwork": self._checkpoint if arguments.uses_experts else None,
            "index": pipeline.retriever,
            "reranker": pipeline.reranker,
        }
        facts = {"version": __version__, **llm}
        facts |= arguments.fingerprint({name: part and part.fingerprint for name, part in loaded.items()})
        commits = {f"{name}_commit": getattr(part, "commit", None) for name, part in loaded.items()}
        return facts | {name: commit for name, commit in commits.items() if commit is not None}

    def get_model_info(self) -> dict[str, Any]:
        """lm-eval's facts, and under ``genpoe`` arguments, fingerprint, where the run comes from, and its costs.

        Under data parallelism, questions and seconds are those of this process.
        """
        seconds = self.pipeline.seconds | self.seconds
        busy = seconds["experts"] + seconds["generate"]
        # vLLM's class has nothing to say.
        llm: dict[str, Any] = getattr(super(), "get_model_info", dict)()
        facts = {
            "arguments": asdict(self.arguments),
            "fingerprint": self.fingerprint,
            "settings": digest(self.fingerprint),
            "documents": self._documents.by_task(),
            "provenance": provenance(),
            "peak_memory": self._peak_memory(),
            "questions": len(self._questions),
            "seconds": {stage: round(value, 3) for stage, value in seconds.items()},
            "questions_per_second": round(len(self._questions) / busy, 3) if busy else None,
        }
        return llm | {"genpoe": RunFacts(facts, None if self.arguments.trace else self._trace)}

    # How lm-eval makes one

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> Any:
        """As lm-eval; see `create_from_arg_obj`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> Any:
        """As lm-eval.

        Raises:
            InputError: an argument that nothing takes, or that lm_eval has an option for, which is given as well.
        """
        check_names(cls, arg_dict, additional_config or {})
        try:
            return super().create_from_arg_obj(arg_dict, additional_config)
        except TypeError as error:
            found = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if found is None or found[1] not in arg_dict:
                raise
            near = nearest_name(cls, found[1])
            raise InputError(
                f"{found[1]}={arg_dict[found[1]]}: no model argument, and nothing that the LLM takes"
                + (f"; did you mean {near}?" if near else "")
            ) from error

    # What lm-eval asks for

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        if not requests:  # which lm-eval's vLLM class does not expect
            return []
        selections = self._select("generate_until", requests)
        with timed(self.seconds, "generate"):
            placed = [
                self._replaced(request, self._place_to_generate(request, selection))
                for request, selection in zip(requests, selections, strict=True)
            ]
        self._note(requests, selections, placed)
        with timed(self.seconds, "generate"):
            return super().generate_until(placed, disable_tqdm=disable_tqdm)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        selections = self._select("loglikelihood", requests)
        with timed(self.seconds, "generate"):
            longest = self._longest_continuations(requests)
            placed = [
                self._replaced(request, self._place_to_score(request, selection, longest[self._sample(request)]))
                for request, selection in zip(requests, selections, strict=True)
            ]
        self._note(requests, selections, placed)
        with timed(self.seconds, "generate"):
            return super().loglikelihood(placed, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """As lm-eval; experts act on every window from its first token. Passages are not put into the scored text."""
        selections = self._select("loglikelihood_rolling", requests)
        self._note(requests, selections, requests)
        with timed(self.seconds, "generate"):
            if self.arguments.mode in PROMPT_MODES and any(selection.strings for selection in selections):
                _log.warning("loglikelihood_rolling scores the text as it is: no passages are put before it")
            if self.store is not None:
                self._windows = Windows(
                    selection
                    for request, selection in zip(requests, selections, strict=True)
                    for _ in get_rolling_token_windows(
                        self.tok_encode(request.args[0]), self.prefix_token_id, self._window_length, 1
                    )
                )
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)

    # Selecting, ahead of everything else

    def _select(self, method: str, requests: Sequence[Instance]) -> list[Selection]:
        """Choose passages and generate experts for all requests."""
        questions = [self._question(request) for request in requests]
        if self.cache_hook.dbdict is not None:
            most = self.arguments.num_retrieved
            response_cache.guard_passages(self.cache_hook.dbdict, method, requests, questions, most)
        selections = self.pipeline.select([request.task_name or "" for request in requests], questions)
        self._questions.update(self._sample(request)[:2] for request in requests)
        self._documents.add(requests)
        if self.store is not None:
            with timed(self.seconds, "experts"):
                strings = (string for selection in selections for string in selection.strings)
                self.store.prepare(strings, progress=self.rank == 0)
        return selections

    def _note(self, requests: Sequence[Instance], selections: Sequence[Selection], placed: Sequence[Instance]) -> None:
        """Trace what the requests, as they were asked and as the LLM gets them, are answered with.

        Ahead of the LLM, since what an interrupted run leaves in a response cache does not come here again. For the
        same reason the cache keeps the lines as well.
        """
        facts = {
            "mode": self.arguments.mode,
            "control": self.arguments.control,
            "hypernetwork": self.fingerprint.get("hypernetwork"),
            "settings": digest(self.fingerprint),
        }
        lines: dict[tuple[Any, ...], str] = {}
        for request, selection, given in zip(requests, selections, placed, strict=True):
            # As lm-eval calls the hash of what was asked in its sample log.
            asked = hash_string(request.args[0])
            line = self._trace.add(request.doc_id, selection, **facts, prompt_hash=asked, prompt=str(given.args[0]))
            lines[request.task_name, request.doc_id, asked] = line
        self._trace.write()
        if self.cache_hook.dbdict is not None:
            response_cache.keep_trace(self.cache_hook.dbdict, lines)

    def _question(self, request: Instance) -> Question:
        """The request's question, and what its doc knows of answers and passages."""
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
    def _sample(request: Instance) -> tuple[Any, ...]:
        """What the requests of one sample, such as the choices of a doc, have in common."""
        return request.task_name, request.doc_id, request.args[0]

    # Passages in prompts

    @staticmethod
    def _replaced(request: Instance, context: PlacedContext) -> Instance:
        """A copy of the request with another context; the request itself is lm-eval's and stays as it is."""
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
        """All choices of a doc get the passages that leave room for the longest of them."""

        def fits(prompt: str) -> bool:
            return sum(map(len, self._encode_pair(prompt, longest))) <= self._scored_length

        return self._place(request.args[0], selection, fits)

    def _longest_continuations(self, requests: Sequence[Instance]) -> dict[tuple[Any, ...], str]:
        continuations: defaultdict[tuple[Any, ...], list[str]] = defaultdict(list)
        for request in requests:
            continuations[self._sample(request)].append(request.args[1])
        return {
            sample: max(choices, key=lambda choice: len(self.tok_encode(choice, add_special_tokens=False)))
            for sample, choices in continuations.items()
        }

    # Experts beside the rows

    def _start(self, context: PlacedContext, text: str, tokens: int) -> int:
        """The first token that sees the experts, where ``text`` (of ``context``) ends after so many tokens."""
        return expert_start(context.question_at, text, tokens, self.tokenizer)

    def _scored_row(self, request: tuple[Any, list[int], list[int]]) -> Row:
        """Whose experts a scored row sees, and from which token of the model's input on."""
        strings, context, continuation = request
        if strings is None:
            return self._windows.next(), 0
        cut = max(0, len(context) + len(continuation) - self._scored_length)
        # lm-eval moves white space from the end of a context to the continuation.
        start = self._start(strings[0], strings[0].rstrip(), len(context) - cut)
        return strings[0].selection, start

    # The response cache

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Accept lm-eval's response cache if it belongs to this very model.

        Raises:
            InputError: it was filled by another model or with other arguments, or the passages of a question depend
                on the other questions of the run, which a cache hides.
        """
        answers = cache_hook.dbdict
        if answers is not None:
            if self.arguments.mixes_rows:
                raise InputError(
                    f"--use_cache cannot serve passages={self.arguments.passages}, where the questions of a run decide "
                    "about each other's passages; leave --use_cache out"
                )
            response_cache.open_cache(answers, self.fingerprint)
            self._trace.keep(response_cache.traced(answers))
        super().set_cache_hook(OriginalKeys(cache_hook))


def _answers(doc: dict[str, Any]) -> tuple[str, ...]:
    """The accepted answers of a doc: a list of strings, one string, or TriviaQA's ``{"aliases": [...]}``."""
    answers = doc.get("answers", doc.get("answer"))
    if isinstance(answers, dict):
        answers = answers.get("aliases")
    if isinstance(answers, str):
        answers = [answers]
    if not isinstance(answers, list | tuple):
        return ()
    return tuple(answer for answer in answers if isinstance(answer, str))
