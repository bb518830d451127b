"""The lm-eval model ``genpoe``: a Hugging Face LLM in the four modes, every row of a batch with its own passages.

The class sees all requests of a run at once. It selects passages and generates experts for all of them, puts
passages into the prompts that need them, and leaves batching, generating and scoring to HFLM. A request's context
travels through HFLM as a string that remembers its selection, and that is how each row finds its experts.
`genpoe_plugin.registration` makes the name known to lm-eval.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook, hash_args
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import Collator, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows
from tqdm import tqdm
from transformers import PreTrainedModel

from genpoe_plugin import __version__
from genpoe_plugin.checkpoint import checkpoint_fingerprint, llm_identity, load_hypernetwork
from genpoe_plugin.controls import CONTROLS
from genpoe_plugin.errors import InputError
from genpoe_plugin.experts.files import ExpertFiles
from genpoe_plugin.experts.injection import RowExperts, inject
from genpoe_plugin.experts.store import ON_DEVICE, ExpertStore
from genpoe_plugin.pipeline import GATES, Pipeline, Selection
from genpoe_plugin.prompts import EXPERT_MODES, MODES, PROMPT_MODES, Prompt, last_question, tokens_from, with_knowledge
from genpoe_plugin.provenance import DocumentDigests, digest, peak_memory, provenance
from genpoe_plugin.questions import Question, passages_from_ctxs
from genpoe_plugin.timing import timed
from genpoe_plugin.trace import Trace

_log = logging.getLogger(__name__)

_FINGERPRINT, _PROBES = "genpoe fingerprint", "genpoe probes"
_PROBES_PER_TASK = 4
# HFLM's arguments that say where and how fast and not what, and those that the fingerprint has in another form.
_NO_OPTIONS = (
    *("device", "batch_size", "max_batch_size", "parallelize", "device_map", "max_memory_per_gpu", "max_cpu_memory"),
    *("offload_folder", "use_fast_tokenizer", "trust_remote_code", "logits_cache"),
    *("revision", "peft", "delta", "dtype", "max_length"),
)


@dataclass(frozen=True)
class GenPoEArguments:
    """What ``--model_args`` may say besides HFLM's own arguments; checked when made.

    Attributes:
        mode: ``closed_book``, ``rag``, ``genpoe`` or ``genpoe_rag``.
        hypernetwork: checkpoint directory or hub id; the genpoe modes need one.
        index: index directory, for docs that bring no ``ctxs``.
        reranker: directory or hub id; without one, passages keep their order and gates are uniform.
        num_retrieved, num_passages: at most how many passages before and after reranking.
        gates: ``softmax`` of the rerank scores, or ``uniform``.
        passages: ``retrieved``, or one of the controls (`genpoe_plugin.controls`).
        question_field: where a doc holds its question; the prompt's last question where a doc does not.
        expert_store: folder that keeps experts for later runs.
        expert_gb: budget for the experts kept beside the LLM.
        trace: JSON Lines file to write, one line a sample.
        seed: of the controls.

    Raises:
        InputError: a value that cannot be, or a combination that cannot run.
    """

    mode: str = "genpoe"
    hypernetwork: str | None = None
    index: str | None = None
    reranker: str | None = None
    num_retrieved: int = 20
    num_passages: int = 4
    gates: str = "softmax"
    passages: str = "retrieved"
    question_field: str = "question"
    expert_store: str | None = None
    expert_gb: float = ON_DEVICE / 10**9
    trace: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (("mode", MODES), ("gates", GATES), ("passages", CONTROLS)):
            if getattr(self, name) not in allowed:
                raise InputError(f"{name}={getattr(self, name)}: not one of {', '.join(allowed)}")
        for name, least in (("num_retrieved", 1), ("num_passages", 1), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise InputError(f"{name}={value}: give a whole number of at least {least}")
        if not isinstance(self.expert_gb, int | float) or not 0 < self.expert_gb < math.inf:
            raise InputError(f"expert_gb={self.expert_gb}: give a number of gigabytes above 0")
        if self.num_passages > self.num_retrieved:
            raise InputError(
                f"num_passages={self.num_passages} is more than num_retrieved={self.num_retrieved}; raise num_retrieved"
            )
        if self.uses_experts and not self.hypernetwork:
            raise InputError(
                f"mode={self.mode} needs hypernetwork=DIRECTORY; `genpoe train hypernetwork` makes one "
                "(or choose mode=rag or mode=closed_book)"
            )
        if self.needs_index and not Path(str(self.index)).is_dir():
            raise InputError(f"index={self.index}: no such directory; `genpoe index build` makes one")

    @property
    def uses_experts(self) -> bool:
        return self.mode in EXPERT_MODES

    @property
    def control(self) -> str:
        """The passage control as the mode leaves it: closed-book has no passages whatever is asked for."""
        return "none" if self.mode == "closed_book" else self.passages

    @property
    def needs_index(self) -> bool:
        return self.control != "none" and self.index is not None

    @property
    def needs_reranker(self) -> bool:
        return self.control not in ("none", "random", "constant") and self.reranker is not None

    @property
    def mixes_rows(self) -> bool:
        """Whether a question's passages depend on which other questions are in the run."""
        return self.control == "shuffled" or (self.control in ("random", "constant") and self.index is None)


class PlacedContext(str):
    """A prompt on its way through HFLM that remembers the request's context, selection and place of its question."""

    original: str
    selection: Selection
    question_at: int | None

    def __new__(cls, prompt: Prompt, original: str, selection: Selection) -> PlacedContext:
        placed = super().__new__(cls, prompt.text)
        placed.original = original
        placed.selection = selection
        placed.question_at = prompt.question_at
        return placed


class _OriginalKeys(CacheHook):
    """Files partial results under the arguments of the original requests, which is where lm-eval looks for them."""

    def __init__(self, hook: CacheHook) -> None:
        self.dbdict = hook.dbdict

    def add_partial(self, attr: str, req: Iterable[Any], res: Any) -> None:
        super().add_partial(attr, [getattr(part, "original", part) for part in req], res)


class GenPoELM(HFLM):
    """HFLM with passages in the prompt, as experts, both, or neither (see `GenPoEArguments`).

    Under data parallelism (``accelerate launch``) every process answers its own share of the docs, with the passages
    that it would give them alone.

    Raises:
        InputError: arguments that cannot be, or parts that do not fit each other.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        *,
        mode: str = "genpoe",
        hypernetwork: str | None = None,
        index: str | None = None,
        reranker: str | None = None,
        num_retrieved: int = 20,
        num_passages: int = 4,
        gates: str = "softmax",
        passages: str = "retrieved",
        question_field: str = "question",
        expert_store: str | None = None,
        expert_gb: float = ON_DEVICE / 10**9,
        trace: str | None = None,
        seed: int = 0,
        **hf_arguments: Any,
    ) -> None:
        self.arguments = arguments = GenPoEArguments(
            mode=mode,
            hypernetwork=hypernetwork,
            index=index,
            reranker=reranker,
            num_retrieved=num_retrieved,
            num_passages=num_passages,
            gates=gates,
            passages=passages,
            question_field=question_field,
            expert_store=expert_store,
            expert_gb=expert_gb,
            trace=trace,
            seed=seed,
        )
        super().__init__(pretrained, **hf_arguments)
        if self.world_size == 1 and hasattr(self, "accelerator"):
            # Processes without several GPUs, which HFLM has all do the same work.
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if self.backend != "causal":
            raise InputError(f"{self._llm_name} is not a decoder-only model, which genpoe needs")
        if arguments.control != "none" and not self.tokenizer.is_fast:
            raise InputError(f"the tokenizer of {self._llm_name} gives no token offsets; genpoe needs a fast tokenizer")
        if mode == "genpoe_rag" and self.truncation:
            raise InputError("truncation=True may cut the question off a prompt; leave it out with mode=genpoe_rag")

        self.store: ExpertStore | None = None
        if arguments.uses_experts:
            assert hypernetwork is not None
            network = load_hypernetwork(hypernetwork, self.model, self.tokenizer)
            # Equal contexts may have different experts, so one's logits cannot serve another.
            self.logits_cache = False
        self.pipeline = self._load_pipeline()
        self.fingerprint = self._fingerprint(hf_arguments)
        if arguments.uses_experts:
            self.store = ExpertStore(
                network,
                self.model,
                self.tokenizer,
                device_bytes=int(arguments.expert_gb * 10**9),
                files=self._expert_files(),
            )
        self.seconds = {"experts": 0.0, "generate": 0.0}
        self._questions: set[tuple[Any, ...]] = set()
        self._documents = DocumentDigests()
        self._trace = Trace(trace, self.rank) if trace else None
        self._rows: RowExperts | None = None
        self._inputs: list[list[int]] | None = None
        self._widest: Selection | None = None
        self._probing = False
        self._windows: deque[Selection] = deque()

    def _expert_files(self) -> ExpertFiles | None:
        """The files of experts that this checkpoint made of this LLM's states, in this precision."""
        if self.arguments.expert_store is None:
            return None
        names = ("pretrained", "revision", "peft", "delta", "dtype", "options", "hypernetwork")
        content = json.dumps([llm_identity(self.model), {name: self.fingerprint[name] for name in names}])
        return ExpertFiles(self.arguments.expert_store, hashlib.sha256(content.encode()).hexdigest()[:16])

    def _load_pipeline(self) -> Pipeline:
        arguments, device = self.arguments, str(self.device)
        retriever = reranker = None
        # Imported here because faiss and the encoders take seconds, and most modes and controls do without.
        if arguments.needs_index:
            from genpoe_plugin.retrieval.retriever import Retriever

            retriever = Retriever.load(str(arguments.index), device=device)
        if arguments.needs_reranker:
            from genpoe_plugin.reranking import Reranker

            reranker = Reranker.load(str(arguments.reranker), device=device)
        return Pipeline(
            self.tokenizer,
            retriever,
            reranker,
            num_retrieved=arguments.num_retrieved,
            num_passages=arguments.num_passages,
            gates=arguments.gates,
            control=arguments.control,
            seed=arguments.seed,
            progress=self.rank == 0,
            from_others=self._from_others,
        )

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
            if self._trace is not None:
                self._trace.join(self.gather_object(self._trace.lines))

    @property
    def _llm_name(self) -> str:
        return self.pretrained if isinstance(self.pretrained, str) else self.pretrained.name_or_path

    def _fingerprint(self, hf_arguments: dict[str, Any]) -> dict[str, Any]:
        """Everything that decides an answer besides the request itself and what its doc brings along."""
        arguments, pipeline = self.arguments, self.pipeline
        facts: dict[str, Any] = {
            "version": __version__,
            "pretrained": self._llm_name,
            "revision": self.revision,
            "peft": self.peft,
            "delta": self.delta,
            "dtype": str(self.model.dtype),
            "max_length": self.max_length,
            "options": {
                name: value
                for name, value in hf_arguments.items()
                if name not in _NO_OPTIONS and isinstance(value, str | int | float)
            },
            "mode": arguments.mode,
        }
        if arguments.uses_experts:
            assert arguments.hypernetwork is not None
            facts["hypernetwork"] = checkpoint_fingerprint(arguments.hypernetwork)
        if arguments.mode != "closed_book":
            facts |= {
                "index": pipeline.retriever and pipeline.retriever.fingerprint,
                "reranker": pipeline.reranker and pipeline.reranker.fingerprint,
                **{
                    name: getattr(arguments, name)
                    for name in ("num_retrieved", "num_passages", "gates", "passages", "question_field", "seed")
                },
            }
        return facts

    def get_model_info(self) -> dict[str, Any]:
        """HFLM's facts, and under ``genpoe`` the arguments, the fingerprint, where the run comes from, and its costs.

        Under data parallelism, questions and seconds are those of this process.
        """
        seconds = self.pipeline.seconds | self.seconds
        busy = seconds["experts"] + seconds["generate"]
        return super().get_model_info() | {
            "genpoe": {
                "arguments": asdict(self.arguments),
                "fingerprint": self.fingerprint,
                "settings": digest(self.fingerprint),
                "documents": self._documents.by_task(),
                "provenance": provenance(),
                "peak_memory": peak_memory(self.device),
                "questions": len(self._questions),
                "seconds": {stage: round(value, 3) for stage, value in seconds.items()},
                "questions_per_second": round(len(self._questions) / busy, 3) if busy else None,
            }
        }

    # What lm-eval asks for

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        with self._selected("generate_until", requests) as selections:
            placed = [
                self._replaced(request, self._place_to_generate(request, selection))
                for request, selection in zip(requests, selections, strict=True)
            ]
            return super().generate_until(placed, disable_tqdm=disable_tqdm)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        with self._selected("loglikelihood", requests) as selections:
            longest = self._longest_continuations(requests)
            placed = [
                self._replaced(request, self._place_to_score(request, selection, longest[self._sample(request)]))
                for request, selection in zip(requests, selections, strict=True)
            ]
            return super().loglikelihood(placed, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """As HFLM; experts act on every window from its first token. Passages are not put into the scored text."""
        with self._selected("loglikelihood_rolling", requests) as selections:
            if self.arguments.mode in PROMPT_MODES and any(selection.strings for selection in selections):
                _log.warning("loglikelihood_rolling scores the text as it is: no passages are put before it")
            if self.store is not None:
                # HFLM asks for the windows' scores in this order and without saying whose windows they are.
                self._windows = deque(
                    selection
                    for request, selection in zip(requests, selections, strict=True)
                    for _ in get_rolling_token_windows(
                        self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1
                    )
                )
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)

    # Selecting, ahead of everything else

    @contextmanager
    def _selected(self, method: str, requests: Sequence[Instance]) -> Iterator[list[Selection]]:
        """Choose passages and generate experts for all requests, and trace that; the block is timed."""
        questions = [self._question(request) for request in requests]
        self._guard_passages(method, requests, questions)
        selections = self.pipeline.select([request.task_name or "" for request in requests], questions)
        self._questions.update(self._sample(request)[:2] for request in requests)
        self._documents.add(requests)
        self._widest = max(selections, key=lambda selection: len(selection.strings), default=None)
        if self.store is not None:
            with timed(self.seconds, "experts"):
                strings = (string for selection in selections for string in selection.strings)
                self.store.prepare(strings, progress=self.rank == 0)
        if self._trace is not None:
            # Ahead of the block, since what an interrupted run left in a response cache does not come here again.
            for request, selection in zip(requests, selections, strict=True):
                self._trace.add(
                    request.doc_id,
                    selection,
                    mode=self.arguments.mode,
                    control=self.arguments.control,
                    hypernetwork=self.fingerprint.get("hypernetwork"),
                    settings=digest(self.fingerprint),
                )
            self._trace.write()
        with timed(self.seconds, "generate"):
            yield selections

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
        prompt = Prompt(context)
        if self.arguments.mode in PROMPT_MODES:
            bos = self.tokenizer.bos_token
            prompt = with_knowledge(context, selection.question.question, selection.strings, fits=fits, bos=bos)
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
            return sum(map(len, self._encode_pair(prompt, longest))) <= self.max_length + 1

        return self._place(request.args[0], selection, fits)

    def _longest_continuations(self, requests: Sequence[Instance]) -> dict[tuple[Any, ...], str]:
        continuations: defaultdict[tuple[Any, ...], list[str]] = defaultdict(list)
        for request in requests:
            continuations[self._sample(request)].append(request.args[1])
        return {
            sample: max(choices, key=lambda choice: len(self.tok_encode(choice, add_special_tokens=False)))
            for sample, choices in continuations.items()
        }

    # Experts beside the batches

    def _expert_rows(self, selections: Sequence[Selection], starts: Sequence[int]) -> RowExperts | None:
        assert self.store is not None
        self._rows = None  # those of the last batch, or for a moment both would be in memory
        return self.store.rows(
            [selection.strings for selection in selections], [selection.gates for selection in selections], starts
        )

    def _start(self, context: PlacedContext, text: str, tokens: int) -> int:
        """The first token that sees the experts, where ``text`` (of ``context``) ends after so many tokens.

        Counted from the end, so it does not matter what is before: BOS, or what left truncation took away.
        """
        if context.question_at is None:
            return 0
        return max(0, tokens - tokens_from(text, context.question_at, self.tokenizer))

    def tok_batch_encode(self, strings: Any, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """As HFLM, which is about to generate from these prompts: their experts are made ready."""
        ids, mask = super().tok_batch_encode(strings, *args, **kwargs)
        if self.store is not None:
            lengths = mask.sum(1).tolist()
            starts = [self._start(context, context, length) for context, length in zip(strings, lengths, strict=True)]
            self._rows = self._expert_rows([context.selection for context in strings], starts)
        return ids, mask

    def _model_generate(self, context: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        with self._injected(len(context)):
            return super()._model_generate(context, *args, **kwargs)

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self._inputs is not None and not self._probing:
            seen = [row[: len(tokens)].tolist() for row, tokens in zip(inps, self._inputs, strict=True)]
            assert seen == self._inputs, "a batch is in another order than its experts"
        with self._injected(len(inps)):
            return super()._model_call(inps, *args, **kwargs)

    @contextmanager
    def _injected(self, batch: int) -> Iterator[None]:
        if self.store is None:
            yield
            return
        rows = self._rows
        if self._probing:
            rows = self._expert_rows([self._widest] * batch, [0] * batch) if self._widest else None
        assert rows is None or len(rows.start) == batch, "a batch has other rows than its experts"
        with inject(self.model, self.store.layer, rows):
            yield

    def _detect_batch_size(self, requests: Sequence[Any] | None = None, pos: int = 0) -> int:
        """As HFLM, with as many experts in every row as the run will see."""
        self._probing = True
        try:
            return super()._detect_batch_size(requests, pos)
        finally:
            self._probing = False

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """As HFLM, which is handed one batch at a time, in the order in which it would sort them itself."""
        if self.store is None:
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
                rows = [owners[number] for number in numbers]
                self._rows = self._expert_rows([selection for selection, _ in rows], [start for _, start in rows])
                self._inputs = [(row[1] + row[2])[-(self.max_length + 1) :][:-1] for row in batch]
                scores = super()._loglikelihood_tokens(batch, disable_tqdm=True, override_bs=len(batch))
                results.update(zip(numbers, scores, strict=True))
                bar.update(len(batch))
        return [results[number] for number in range(len(requests))]

    def _scored_row(self, request: tuple[Any, list[int], list[int]]) -> tuple[Selection, int]:
        """Whose experts a scored row sees, and from which token of the model's input on."""
        strings, context, continuation = request
        if strings is None:
            # A window of a rolling text. A process with fewer of them than others adds some whose scores are dropped.
            return self._windows.popleft() if len(self._windows) > 1 else self._windows[0], 0
        cut = max(0, len(context) + len(continuation) - (self.max_length + 1))
        # HFLM moves white space from the end of a context to the continuation.
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
            self._check_fingerprint(answers)
            # Hits never reach the model, so a few questions of each task are asked again in every run.
            for probe in answers.get(_PROBES, {}):
                answers.pop(probe, None)
        super().set_cache_hook(_OriginalKeys(cache_hook))

    def _check_fingerprint(self, answers: MutableMapping[str, Any]) -> None:
        saved = answers.get(_FINGERPRINT)
        if saved is None:
            if len(answers):
                raise InputError("--use_cache: the cache was filled by another model; give another path")
            answers[_FINGERPRINT] = self.fingerprint
        elif saved == self.fingerprint:
            if self._trace is not None:
                self._trace.keep_earlier()
        else:
            names = [name for name in self.fingerprint | saved if self.fingerprint.get(name) != saved.get(name)]
            differences = "; ".join(f"{name} was {saved.get(name)}, is {self.fingerprint.get(name)}" for name in names)
            raise InputError(f"--use_cache: the cache belongs to another run ({differences}); give another path")

    def _guard_passages(self, method: str, requests: Sequence[Instance], questions: Sequence[Question]) -> None:
        """Refuse a cache whose keys, made of prompts alone, stand for other passages than the docs bring along now."""
        answers = self.cache_hook.dbdict
        if answers is None:
            return
        probes: dict[str, str] = answers.get(_PROBES, {})
        digests: dict[str, str] = {}
        probed: defaultdict[str | None, int] = defaultdict(int)
        for request, question in zip(requests, questions, strict=True):
            if not question.passages:
                continue
            key = hash_args(method, request.args)
            content = json.dumps([asdict(passage) for passage in question.passages[: self.arguments.num_retrieved]])
            digest = hashlib.sha256(content.encode()).hexdigest()
            where = f"--use_cache: question {question.question!r} of task {request.task_name}"
            if digests.setdefault(key, digest) != digest:
                raise InputError(f"{where} comes with two sets of passages and one prompt; leave --use_cache out")
            if probes.get(key, digest) != digest:
                raise InputError(f"{where} had other passages when the cache was filled; give another path")
            if key in probes or probed[request.task_name] < _PROBES_PER_TASK:
                probes[key] = digest
                probed[request.task_name] += 1
        answers[_PROBES] = probes


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
