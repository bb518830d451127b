"""How much memory a training will take, before anything is loaded.

The formulas leave out what is small (index tensors, an allocator's rounding). Against all tensors that are alive in
real steps of small models, the total is at most 5 % too low and 30 % too high for Llama-like LLMs, and within 30 % for
others. Attention is taken to run in a kernel that keeps no scores (torch's scaled dot product attention, transformers'
default).

The letters of the formulas:

    d, a, n, V   width of the LLM, of its attention (heads x head size), number of layers, vocabulary
    f            width of its MLP; taken from the MLP's number of weights M as 3·f = M / d, as gated MLPs have it
    w, c         bytes of a number: of the LLM's weights, and of what the forward pass computes
    N = R·T      tokens in memory at a time: R rows of T
    P            number of weights that learn; they are float32, whatever the forward pass computes in

A training holds, all the time:

    the LLM's weights     w x their number (of a quantised one, what its files hold)
    weights that learn    4·P, gradients 4·P, AdamW's two moments 8·P (its step counters are left out)

Sharded over S devices, each has 1/S of the last line, and for a pass also the whole weights and gradients, 2·c·P.

At the height of a forward and backward pass, besides:

    a frozen layer      N·(8·(d + 1) + c·(4·a + 3·f + T) + 4·heads): the input of two norms, in float32, with scales;
                        queries, keys, values and output of the attention, its mask and log sums; three parts of the MLP
    where it learns     N·(2·w·d + c·(2·d + a + f)): what its norms and linear layers read
    an adapter          N·c per number that its linear layers read or pass on
    gradients           N·c·3·f: of the three parts of an MLP
    bfloat16 copies     2 bytes a number of float32 weights, where the forward pass computes in bfloat16

where the LLM only reads, and nothing is kept:

    a layer             N·(4·w·d + c·(3·f + T) + T): four of its states, three parts of its MLP, and the mask of the
                        attention in both its forms

and in AdamW's step, when those are gone, 4·P of intermediate results; on a CPU 8 x the largest tensor's numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from genpoe_plugin.errors import InputError
from genpoe_plugin.training.model_size import AdapterSize, LanguageModelSize

Precision = Literal["float32", "bfloat16"]
Phase = Literal["always", "generating", "pass", "teaching", "backward", "step"]
PHASES: dict[Phase, str] = {
    "always": "all the time",
    "generating": "while experts are generated",
    "pass": "in a forward and backward pass",
    "teaching": "besides, while the LLM teaches",
    "backward": "besides, on the way back",
    "step": "in an optimizer step",
}
FLOAT32 = 4


@dataclass(frozen=True)
class Part:
    """Something that takes ``size`` bytes in one phase of a training."""

    name: str
    size: int
    phase: Phase = "always"


@dataclass(frozen=True)
class MemoryEstimate:
    """What a training takes on one device.

    Attributes:
        parts: what for.
        ways_out: groups of changes that would lower it, each with the total that it leads to; within a group from the
            smallest change to the largest.
    """

    parts: tuple[Part, ...]
    ways_out: tuple[tuple[tuple[str, int], ...], ...] = ()

    def phase(self, phase: Phase) -> int:
        """Bytes of one phase's own parts."""
        return sum(part.size for part in self.parts if part.phase == phase)

    @property
    def total(self) -> int:
        """Bytes at the worst moment: what is held all the time, and the largest of what is not at the same time."""
        whole_pass = self.phase("pass") + max(self.phase("teaching"), self.phase("backward"))
        return self.phase("always") + max(self.phase("generating"), whole_pass, self.phase("step"))

    def table(self) -> str:
        """For people: a line a part, by phase, and the total."""
        lines = []
        for phase, title in PHASES.items():
            if parts := [part for part in self.parts if part.phase == phase and part.size]:
                lines += [f"memory {title}", *(f"  {part.name:<46}{_bytes(part.size):>12}" for part in parts)]
        return "\n".join([*lines, f"{'at most, at the same time':<48}{_bytes(self.total):>12}"])


def check_fits(estimate: MemoryEstimate, available: int) -> None:
    """Refuse a training that needs more than ``available`` bytes.

    Raises:
        InputError: it does; the message says what takes the most, and what would make it fit.
    """
    if estimate.total <= available:
        return
    largest = sorted(estimate.parts, key=lambda part: -part.size)[:3]
    needs = f"training needs about {_bytes(estimate.total)} of memory, {_bytes(available)} are free (most for "
    needs += ", ".join(f"{part.name} {_bytes(part.size)}" for part in largest) + ")"
    fitting = [next((text for text, total in group if total <= available), None) for group in estimate.ways_out]
    if found := [text for text in fitting if text is not None]:
        raise InputError(f"{needs}; it fits with {', or with '.join(found)}")
    if not estimate.ways_out:
        raise InputError(f"{needs}; it needs a larger device")
    advice = ", ".join(f"{text} (then {_bytes(total)})" for *_, (text, total) in estimate.ways_out)
    raise InputError(f"{needs}; no change alone is enough, but these help: {advice}")


@dataclass(frozen=True, kw_only=True)
class HypernetworkPlan:
    """A training of a hypernetwork, as one device sees it.

    Attributes:
        llm: the frozen one.
        weights: that learn, the number of them.
        largest_weight: of these, in the largest tensor.
        buffers: numbers of it that do not learn (base matrices).
        expert_bytes: of one generated expert, in float32.
        expert_width: numbers that an expert keeps a token: the widths of its inner products, ``2·rank + expert_width``
            for the dense form.
        state_width: numbers that the hypernetwork reads of a passage's token.
        queries: of the hypernetwork, that look at a passage's tokens.
        attention: whether the experts are in the LLM's attention.
        contextual: whether the LLM reads the passages up to the experts' layer.
        layer: of the experts, counted from 0.
        rows: examples in memory at a time.
        num_experts: an example.
        tokens: of the longest prompt with its answer.
        answer_tokens: of the longest answer.
        passage_tokens: of the longest passage.
        teacher_tokens: of the longest prompt with its passages and answer, which the LLM reads as a teacher; 0 if none
            does.
        kept_states: bytes of what the LLM made of passages, where they are in the memory that is counted.
        precision: that the forward pass computes in.
        shards: devices that what learns is sharded over.
        device_type: where the optimizer runs, as ``torch.device`` has it.
    """

    llm: LanguageModelSize
    weights: int
    largest_weight: int
    buffers: int
    expert_bytes: int
    expert_width: int
    state_width: int
    queries: int
    contextual: bool
    layer: int
    rows: int
    num_experts: int
    tokens: int
    answer_tokens: int
    passage_tokens: int
    attention: bool = False
    teacher_tokens: int = 0
    kept_states: int = 0
    precision: Precision = "float32"
    shards: int = 1
    device_type: str = "cpu"

    def estimate(self) -> MemoryEstimate:
        """What it takes. By the letters of the module, with E bytes and e numbers an expert, K experts an example, Q
        queries, p tokens a passage, A of the answer, t of a teacher's prompt, and l the experts' layer, a pass has:

            generated experts     R·K·E: those of the batch
            token states          4·R·K·p·s: of their passages, s numbers a token
            findings              c·R·K·Q·(d + p): what the queries find, and how much of it in which token
            branch                N·c·(d + 3·K·e): what the experts read and keep, with its gradients
            layers above          n - l - 1 times a frozen layer
            answers' predictions  8·R·(A + 1)·V: logits in float32, and their logarithms

        on the way back also the largest of the gradients: of the experts, of a layer, or of the logits; before that,
        if the LLM is a teacher, the larger of

            a layer that reads    R rows of t tokens
            its predictions       24·R·(A + 1)·V: logits, logarithms of both, and three steps of the divergence

        and before the whole pass, when the experts are generated, the larger of

            a layer that reads    R·K rows of p tokens, if token states are contextual
            experts               and findings, and 12·R·K·p·s: token states in three steps of being normalised
        """
        own = self._parts()
        least = replace(self, weights=0, largest_weight=0, buffers=0, expert_bytes=0, expert_width=0, queries=0)
        ways = [
            _fewer_rows(self.rows, lambda rows: replace(self, rows=rows)._parts()),
            [("precision=bfloat16", replace(self, precision="bfloat16")._parts())],
            [("an LLM in bfloat16", replace(self, llm=_in_bfloat16(self.llm))._parts())],
            [] if self.attention else [("states=embeddings", replace(self, contextual=False)._parts())],
            [("distillation=0 and unanswerable=0", replace(self, teacher_tokens=0)._parts())],
            [("a hypernetwork of a fraction of the size (another head, a lower rank)", least._parts())],
            [(f"sharding over {shards} devices", replace(self, shards=shards)._parts()) for shards in (2, 4, 8)],
        ]
        return _with_ways_out(own, ways)

    def _parts(self) -> tuple[Part, ...]:
        llm, passages = self.llm, self.rows * self.num_experts
        number = _computed(llm, self.precision)
        branch = FLOAT32 if self.precision == "float32" else 2
        above = llm.layers - self.layer - 1
        layer = _frozen_layer(llm, self.rows, self.tokens, number)
        gradients = self.rows * self.tokens * number * llm.mlp_width
        read = llm.hidden_size + 3 * self.num_experts * self.expert_width
        experts = passages * self.expert_bytes
        states = FLOAT32 * passages * self.passage_tokens * self.state_width
        found = branch * passages * self.queries * (llm.hidden_size + self.passage_tokens)
        reading = _reading_layer(llm, passages, self.passage_tokens, number) if self.contextual else 0
        teaching = _reading_layer(llm, self.rows, self.teacher_tokens, number)
        logits = FLOAT32 * self.rows * (self.answer_tokens + 1) * llm.vocabulary
        return (
            Part("LLM weights", llm.weight_bytes),
            *_learning("hypernetwork", self.weights, self.largest_weight, self),
            Part("hypernetwork base", FLOAT32 * self.buffers),
            Part("states of passages that are kept", self.kept_states),
            Part("passages", max(reading, 3 * states + found + experts), "generating"),
            Part("generated experts", experts, "pass"),
            Part("token states of passages", states, "pass"),
            Part("what queries find in passages", found, "pass"),
            Part("activations of the experts", self.rows * self.tokens * branch * read, "pass"),
            Part("activations of the layers above", above * layer, "pass"),
            Part("bfloat16 copies of LLM weights", above * _cast(llm, self.precision), "pass"),
            Part("predictions of the answers", 2 * logits, "pass"),
            Part("teacher", max(teaching, 6 * logits) if self.teacher_tokens else 0, "teaching"),
            Part("the largest gradients", max(experts, gradients, logits), "backward"),
        )


@dataclass(frozen=True, kw_only=True)
class RerankerPlan:
    """A training of a reranker, as one device sees it.

    Attributes:
        llm: what it starts from.
        adapter: what learns; everything if None, and then in float32.
        groups: in memory at a time.
        group_size: passages in each: positive and negatives.
        tokens: of the longest pair of question and passage, with the prompt.
        gradient_checkpointing: whether layers keep their input only, and compute the rest again.
        precision: that the forward pass computes in.
        shards: devices that what learns is sharded over.
        device_type: where the optimizer runs, as ``torch.device`` has it.
    """

    llm: LanguageModelSize
    adapter: AdapterSize | None
    groups: int
    group_size: int
    tokens: int
    gradient_checkpointing: bool = False
    precision: Precision = "float32"
    shards: int = 1
    device_type: str = "cpu"

    def estimate(self) -> MemoryEstimate:
        """What it takes.

        By the letters of the module, a pass has:

            activations   n layers and the gradients of one; with gradient checkpointing n inputs, N·w·d each, the
                          layer that is computed again, and the gradients of one
            predictions   2·R·V·c: the logits of one position, and their gradients
        """
        own = self._parts()
        ways = [
            _fewer_rows(self.groups, lambda groups: replace(self, groups=groups)._parts()),
            [("gradient checkpointing", replace(self, gradient_checkpointing=True)._parts())],
            [("precision=bfloat16", replace(self, precision="bfloat16")._parts())],
        ]
        if self.adapter is None:
            frozen = replace(self, adapter=AdapterSize(0, 0))._parts()
            ways += [[("a LoRA adapter in the place of all weights", frozen)]]
            ways += [[(f"sharding over {n} devices", replace(self, shards=n)._parts()) for n in (2, 4, 8)]]
        else:
            ways += [[("an LLM in bfloat16", replace(self, llm=_in_bfloat16(self.llm))._parts())]]
        return _with_ways_out(own, ways)

    def _parts(self) -> tuple[Part, ...]:
        llm, rows = self.llm, self.groups * self.group_size
        number, positions = _computed(llm, self.precision), rows * self.tokens
        layer = _frozen_layer(llm, rows, self.tokens, number)
        if self.adapter is None:
            held = _learning("LLM", llm.weights, llm.largest_weight, self)
            # Each linear layer casts what it reads for itself, where it casts.
            reads = 2 if number == llm.number_bytes else 5
            inputs = reads * llm.hidden_size + llm.attention_width + llm.mlp_width // 3
            layer += positions * (2 * llm.number_bytes * llm.hidden_size + number * inputs)
        else:
            adapter = _learning("adapter", self.adapter.weights, 0, self)
            held = (Part("LLM weights", llm.weight_bytes), *adapter)
            adapted = FLOAT32 if self.precision == "float32" else 2
            layer += positions * adapted * self.adapter.kept // llm.layers
            layer += _cast(llm, self.precision)
        if self.gradient_checkpointing:
            activations = positions * llm.number_bytes * llm.hidden_size * llm.layers + layer
        else:
            activations = llm.layers * layer
        return (
            *held,
            Part("activations", activations + positions * number * llm.mlp_width, "pass"),
            Part("predictions", 2 * rows * llm.vocabulary * number, "pass"),
        )


def _computed(llm: LanguageModelSize, precision: Precision) -> int:
    """Bytes of a number that the forward pass computes [c]."""
    return 2 if precision == "bfloat16" else llm.number_bytes


def _cast(llm: LanguageModelSize, precision: Precision) -> int:
    """Bytes of the copies of one frozen layer's weights that a pass in bfloat16 makes and keeps."""
    return 2 * llm.layer_weights if precision == "bfloat16" and llm.number_bytes == FLOAT32 else 0


def _in_bfloat16(llm: LanguageModelSize) -> LanguageModelSize:
    if llm.number_bytes == 2:
        return llm
    return replace(llm, number_bytes=2, weight_bytes=2 * llm.weights)


def _frozen_layer(llm: LanguageModelSize, rows: int, tokens: int, number: int) -> int:
    """Bytes that a layer keeps for the backward pass, if nothing in it learns."""
    norms = 2 * FLOAT32 * (llm.hidden_size + 1)
    attention = number * (4 * llm.attention_width + tokens) + FLOAT32 * llm.heads
    return rows * tokens * (norms + attention + number * llm.mlp_width)


def _reading_layer(llm: LanguageModelSize, rows: int, tokens: int, number: int) -> int:
    """Bytes at the height of a layer of a pass that keeps nothing."""
    states = 4 * llm.number_bytes * llm.hidden_size
    return rows * tokens * (states + number * llm.mlp_width + (number + 1) * tokens)


def _learning(name: str, weights: int, largest: int, plan: HypernetworkPlan | RerankerPlan) -> tuple[Part, ...]:
    """The parts of ``weights`` numbers that AdamW trains, ``largest`` of them in one tensor."""
    number = FLOAT32 if plan.precision == "float32" else 2
    share = -(-weights // plan.shards)
    # A pass needs all weights in one place; without shards they are there, if not in its own precision.
    whole = 2 * number * weights if plan.shards > 1 else (0 if number == FLOAT32 else number * weights)
    # torch steps all tensors of an accelerator at once, in one round of intermediate results, on a CPU one by one.
    step = 2 * -(-largest // plan.shards) if plan.device_type == "cpu" else share
    return (
        Part(f"{name} weights", FLOAT32 * share),
        Part(f"{name} gradients", FLOAT32 * share),
        Part("AdamW's moments", 2 * FLOAT32 * share),
        Part(f"{name} weights for the pass", whole, "pass"),
        Part("AdamW's intermediate results", FLOAT32 * step, "step"),
    )


def _fewer_rows(rows: int, parts: Callable[[int], tuple[Part, ...]]) -> list[tuple[str, tuple[Part, ...]]]:
    halves = [rows >> shift for shift in range(1, rows.bit_length())]
    return [(f"micro_batch_size={half}", parts(half)) for half in halves]


def _with_ways_out(own: tuple[Part, ...], ways: Sequence[Sequence[tuple[str, tuple[Part, ...]]]]) -> MemoryEstimate:
    estimate = MemoryEstimate(own)
    groups = [
        tuple((text, total) for text, parts in group if (total := MemoryEstimate(parts).total) < estimate.total)
        for group in ways
    ]
    return replace(estimate, ways_out=tuple(group for group in groups if group))


def _bytes(size: int) -> str:
    """``size`` in the largest unit that it fills."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size} B"
