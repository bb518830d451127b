"""The arguments of an evaluation. Each is declared once, as a field of `GenPoEArguments`.

The declaration (`_argument`) says whether the argument may change an answer, which modes and controls use it, and what
it means. These follow from it: the fingerprint of a run (`GenPoEArguments.fingerprint`), the settings that distinguish
runs on a leaderboard (`tells_apart`), the names that the model classes accept, and the table in docs/evaluating.md.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from genpoe_plugin.errors import InputError
from genpoe_plugin.experts.config import HypernetworkConfig
from genpoe_plugin.experts.store_options import DTYPES, ON_DEVICE
from genpoe_plugin.prompts import EXPERT_MODES, MODES
from genpoe_plugin.retrieval.loading import index_directories
from genpoe_plugin.selection.controls import CONTROLS
from genpoe_plugin.selection.gates import GATES

PASSAGE_MODES = tuple(mode for mode in MODES if mode != "closed_book")
_WITH_PASSAGES = tuple(control for control in CONTROLS if control != "none")
_DRAWN = ("random", "constant")
_RANKED = tuple(control for control in _WITH_PASSAGES if control not in _DRAWN)


@dataclass(frozen=True)
class Use:
    """The use of an argument.

    Attributes:
        meaning: description in Markdown, for the table in docs/evaluating.md.
        decides: whether an answer may depend on the argument.
        modes, controls: the values of ``mode`` and ``passages`` with which the argument has an effect.
        choices: all allowed values, including None if the argument is optional; None if they cannot be listed.
        least: the smallest allowed value of an integer.
        positive: for a number that must be above 0, its description in the error message; otherwise None.
        loaded: whether the argument names something to load. Fingerprints then contain the fingerprint of its content.
        traced: whether the trace shows its effect in every mode with passages, even if no answer depends on it. The
            response cache keeps the trace, so the fingerprint contains the argument in all of these modes.
        later: whether the argument is newer than some recorded runs. Fingerprints and settings contain it only if it
            differs from the default, so those of older runs do not change.
    """

    meaning: str
    decides: bool = True
    modes: Collection[str] = PASSAGE_MODES
    controls: Collection[str] = _WITH_PASSAGES
    choices: Collection[str | None] | None = None
    least: int | None = None
    positive: str | None = None
    loaded: bool = False
    traced: bool = False
    later: bool = False

    def wrong_with(self, value: Any) -> str | None:
        """Why the value is invalid, or what to give instead; None if it is valid."""
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if self.choices is not None and value not in self.choices:
            return f"not one of {', '.join(filter(None, self.choices))}"
        if self.least is not None and not (number and isinstance(value, int) and value >= self.least):
            return f"give a whole number of at least {self.least}"
        if self.positive is not None and not (number and 0 < value <= sys.float_info.max):
            return f"give {self.positive} above 0"
        return None


def _argument(default: Any, meaning: str, **use: Any) -> Any:
    return field(default=default, metadata={"use": Use(meaning, **use)})


@dataclass(frozen=True)
class GenPoEArguments:
    """The arguments in ``--model_args`` that lm-eval's own class does not have.

    `ARGUMENTS` holds the use of each; docs/evaluating.md has a table of them.

    Raises:
        InputError: a value is invalid, or a combination of values cannot run.
    """

    mode: str = _argument(
        "genpoe",
        "`closed_book`, `rag` (passages in the prompt), `genpoe` (passages as experts), `genpoe_rag` (both)",
        modes=MODES,
        controls=CONTROLS,
        choices=MODES,
    )
    hypernetwork: str | None = _argument(
        None,
        "checkpoint directory or hub id (`user/name`, `user/name@revision`); the genpoe modes need one",
        modes=EXPERT_MODES,
        controls=CONTROLS,
        loaded=True,
    )
    index: str | None = _argument(
        None,
        "index directory on this machine, since indexes are not on the hub, or several as `DENSE+BM25`, whose "
        "rankings are joined; not needed where every doc brings its passages (`ctxs`)",
        loaded=True,
    )
    reranker: str | None = _argument(
        None,
        "directory or hub id (`user/name`, `user/name@revision`); without one, passages keep their order and "
        "`softmax` gates are uniform",
        controls=_RANKED,
        loaded=True,
    )
    reranker_format: str | None = _argument(
        None,
        "format of a decoder-LLM reranker whose checkpoint does not say it: `bge`, `qwen3`, `likelihood`, or a "
        "template file (below)",
        controls=_RANKED,
        later=True,
    )
    num_retrieved: int = _argument(20, "maximum number of passages before reranking", controls=_RANKED, least=1)
    num_passages: int = _argument(
        4, "maximum number of passages after reranking", controls=(*_RANKED, "random"), least=1
    )
    gates: str = _argument(
        "softmax",
        "`softmax` (of the rerank scores), `retriever` (softmax of the retriever's scores) or `uniform`",
        modes=EXPERT_MODES,
        controls=_RANKED,
        choices=GATES,
        traced=True,
    )
    gate_temperature: float = _argument(
        1.0,
        "divides the scores before the softmax: a large value makes the gates equal, with a small one only the best "
        "passage counts",
        modes=EXPERT_MODES,
        controls=_RANKED,
        positive="a finite number",
        traced=True,
        later=True,
    )
    passages: str = _argument(
        "retrieved",
        "controls: `gold`, `shuffled`, `random`, `constant`, `none`",
        controls=CONTROLS,
        choices=CONTROLS,
    )
    expert_layers: str | int | None = _argument(
        None,
        "`5+11+12`: use only these layers of a checkpoint (experts in the attention)",
        modes=EXPERT_MODES,
        controls=CONTROLS,
        later=True,
    )
    question_field: str = _argument("question", "field of a doc with the retrieval query")
    expert_dtype: str | None = _argument(
        None,
        "data type of stored experts: `float32`, `float16`, `bfloat16` or, in the attention, `int8`; the LLM's by "
        "default",
        modes=EXPERT_MODES,
        controls=CONTROLS,
        choices=(None, *DTYPES),
        later=True,
    )
    expert_store: str | None = _argument(
        None, "folder to store experts in, for later runs and other modes", decides=False, modes=EXPERT_MODES
    )
    expert_gb: float = _argument(
        ON_DEVICE / 10**9,
        "gigabytes of experts to cache beside the LLM; the least recently used are dropped first",
        decides=False,
        modes=EXPERT_MODES,
        positive="a number of gigabytes",
    )
    trace: str | None = _argument(
        None,
        "JSON Lines file with passages, ranks, scores, gates and the whole prompt of every sample; by default "
        "beside the results that lm-eval saves (lm-eval's own log has the prompts without passages)",
        decides=False,
        modes=MODES,
        controls=CONTROLS,
    )
    seed: int = _argument(0, "random seed of the controls", controls=("shuffled", *_DRAWN), least=0)

    def __post_init__(self) -> None:
        for name in ARGUMENTS:
            check_value(name, getattr(self, name))
        object.__setattr__(self, "gate_temperature", float(self.gate_temperature))  # 2 and 2.0 are the same
        if self.gates == "uniform" and self.gate_temperature != DEFAULTS["gate_temperature"]:
            raise InputError(
                f"gate_temperature={self.gate_temperature:g} with gates=uniform: they are equal at any temperature; "
                "leave it out, or give gates=softmax or gates=retriever"
            )
        if self.reranker_format is not None and self.reranker is None:
            raise InputError(f"reranker_format={self.reranker_format} without a reranker; give reranker= as well")
        if self.num_passages > self.num_retrieved:
            raise InputError(
                f"num_passages={self.num_passages} is more than num_retrieved={self.num_retrieved}; raise num_retrieved"
            )
        if self.expert_layers is not None and not re.fullmatch(r"\d+(\+\d+)*", str(self.expert_layers)):
            raise InputError(
                f"expert_layers={self.expert_layers}: give layer numbers with + between them, such as 5+11+12"
            )
        if self.uses_experts and not self.hypernetwork:
            raise InputError(
                f"mode={self.mode} needs hypernetwork=DIRECTORY; `genpoe train hypernetwork` makes one, and "
                "`genpoe experts create` one that needs no training (or choose mode=rag or mode=closed_book)"
            )
        if self.needs_index:
            try:
                index_directories(str(self.index))
            except InputError as error:
                raise InputError(f"index={error}") from error

    @property
    def wanted_layers(self) -> tuple[int, ...]:
        """The layers that ``expert_layers`` names, in ascending order."""
        return tuple(sorted({int(number) for number in str(self.expert_layers).split("+")}))

    def layers_of(self, config: HypernetworkConfig) -> tuple[int, ...]:
        """The layers of a checkpoint that are used, in ascending order.

        Raises:
            InputError: ``expert_layers`` has others than the checkpoint, or the experts stand beside an MLP.
        """
        if self.expert_layers is None:
            return config.layers
        wanted = self.wanted_layers
        if config.head != "attention":
            raise InputError("expert_layers is for experts in the attention; those of this checkpoint are in one layer")
        if missing := sorted(set(wanted) - set(config.layers)):
            raise InputError(
                f"expert_layers={self.expert_layers}: the checkpoint has no experts in layer {missing[0]}, "
                f"only in {'+'.join(map(str, config.layers))}"
            )
        return wanted

    @property
    def uses_experts(self) -> bool:
        return self.mode in EXPERT_MODES

    @property
    def control(self) -> str:
        """The passage control in this mode."""
        return control_of(self.mode, self.passages)

    @property
    def needs_index(self) -> bool:
        return is_used("index", self.mode, self.control) and self.index is not None

    @property
    def needs_reranker(self) -> bool:
        return is_used("reranker", self.mode, self.control) and self.reranker is not None

    @property
    def mixes_rows(self) -> bool:
        """Whether the passages of a question depend on the other questions of the run."""
        return self.control == "shuffled" or (self.control in _DRAWN and self.index is None)

    def fingerprint(self, loaded: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments that may change an answer in this mode, with their values.

        It ignores the control, so the response cache may be refused without need, but never accepted wrongly.

        Args:
            loaded: for each argument that names something to load, the fingerprint of what was loaded, or None.
        """
        facts = {}
        for name, use in ARGUMENTS.items():
            value = getattr(self, name)
            modes = PASSAGE_MODES if use.traced else use.modes
            if use.decides and self.mode in modes and not (use.later and value == DEFAULTS[name]):
                facts[name] = loaded[name] if use.loaded else value
        if "expert_layers" in facts:
            facts["expert_layers"] = self.wanted_layers  # 5+11 and 11+5 are the same
        return facts


ARGUMENTS: dict[str, Use] = {argument.name: argument.metadata["use"] for argument in fields(GenPoEArguments)}
"""The use of every argument, by its name."""
DEFAULTS: dict[str, Any] = {argument.name: argument.default for argument in fields(GenPoEArguments)}
LOADED = tuple(name for name, use in ARGUMENTS.items() if use.loaded)
"""The arguments that name something to load."""
NON_DECIDING = frozenset(
    {
        *(name for name, use in ARGUMENTS.items() if not use.decides),
        # Of lm-eval's own classes:
        *("batch_size", "max_batch_size", "device"),
        # On vLLM:
        *("device_memory", "gpu_memory_utilization", "kv_cache_memory_bytes", "max_num_seqs", "max_num_batched_tokens"),
        *("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "distributed_executor_backend"),
        *("max_loras", "max_cpu_loras", "max_lora_rank", "enforce_eager", "disable_log_stats"),
    }
)
"""The arguments, ours and those of lm-eval and vLLM, that do not change an answer."""


def control_of(mode: str, passages: str) -> str:
    """The passage control in a mode: closed-book always has no passages."""
    return "none" if mode == "closed_book" else passages


def is_used(name: str, mode: str, control: str) -> bool:
    """Whether ``mode`` with the passages of ``control`` uses the argument ``name``."""
    return mode in ARGUMENTS[name].modes and control in ARGUMENTS[name].controls


def tells_apart(name: str, value: Any, mode: str, control: str) -> bool:
    """Whether this value distinguishes a run from one without the argument, in ``mode`` and with ``control``.

    Args:
        name: any model argument. Names in neither `ARGUMENTS` nor `NON_DECIDING` always distinguish runs.
        value: its value.
        mode, control: those of the run.
    """
    if name in NON_DECIDING or value is None:
        return False
    if name not in ARGUMENTS:
        return True
    return is_used(name, mode, control) and not (ARGUMENTS[name].later and value == DEFAULTS[name])


def check_value(name: str, value: Any) -> None:
    """Check the value of one argument.

    Raises:
        InputError: the value is invalid.
    """
    if wrong := ARGUMENTS[name].wrong_with(value):
        raise InputError(f"{name}={value}: {wrong}")
