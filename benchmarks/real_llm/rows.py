"""The rows of a study, most important first. Each row is one evaluation with lm_eval."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.real_llm.layers import Heads, Layers
from benchmarks.real_llm.questions import DISTRACTORS


@dataclass(frozen=True)
class StudyRow:
    """One evaluation with lm_eval over all data sets.

    Attributes:
        mode, passages, num_passages, gates: arguments of the genpoe model.
        purpose: purpose of the question file (`benchmarks.real_llm.questions.PURPOSES`).
        layers: layers with experts; empty in modes without experts.
        heads: key-value heads per layer; empty for all.
        checkpoint: checkpoint of the experts; by default the study's, which has all layers.
        adapter: LoRA adapter of the LLM.
        expert_dtype: dtype of stored experts; by default the LLM's.
        curve: whether the row uses the smaller number of questions, ``limit_curve``.
        against: rows that it is compared with, paired by question.
    """

    name: str
    mode: str
    purpose: str = "gold"
    passages: str = "retrieved"
    num_passages: int = 1
    gates: str = "softmax"
    layers: Layers = ()
    heads: Heads = ()
    checkpoint: Path | None = None
    adapter: Path | None = None
    expert_dtype: str | None = None
    curve: bool = False
    against: tuple[str, ...] = ("closed_book",)

    @property
    def reads_gold(self) -> bool:
        """Whether the row has the right passage, and only that, as an expert, and no passage in the prompt."""
        return (self.mode, self.purpose, self.passages) == ("genpoe", "gold", "retrieved")


MEANINGS = {
    "closed_book": "the LLM alone",
    "rag": "the right passage in the prompt",
    "genpoe": "the right passage as experts",
    "genpoe_quarter": "the right passage as experts in at most a quarter of the layers",
    "genpoe_heads": "the right passage as experts of selected key-value heads, in as many bytes as genpoe_quarter",
    "genpoe_all_layers": "the right passage as experts in all layers",
    "genpoe_shuffled": "another question's passage as experts",
    "genpoe_rag": "the right passage in the prompt and as experts",
    "rag_retrieved": "the first passage retrieved by MiniLM, in the prompt",
    "genpoe_retrieved": "the first passage retrieved by MiniLM, as experts",
    "genpoe_random": "a random passage without an answer, as experts",
    "genpoe_constant": "one passage for all questions, as experts",
    "genpoe_none": "the model of `genpoe` without a passage; must equal `closed_book`",
    "genpoe_rag_shuffled": "another question's passage in the prompt and as experts",
    "rag_four": f"the right passage and {DISTRACTORS} hard distractors in the prompt, the right one first",
    "genpoe_four": "the same four as experts; each distractor has a seventh of the right passage's gate",
    "genpoe_four_equal": "the same four as experts with equal gates",
    "genpoe_four_wrong_first": "the same four as experts; a distractor has the largest gate, each other a seventh",
    "layers_N": "the right passage as experts in N layers",
}
"""Meaning of each row. There is one `layers_N` per set of layers."""


def study_rows(
    sets: dict[int, Layers],
    main: Layers,
    quarter: Layers,
    everything: Layers,
    heads: tuple[Path, Layers, Heads] | None = None,
) -> list[StudyRow]:
    """All rows of a study.

    Args:
        sets: sets of layers by size.
        main: layers of all rows that do not vary the layers.
        quarter: layers of ``genpoe_quarter``.
        everything: all layers of the LLM.
        heads: checkpoint, layers and key-value heads of ``genpoe_heads``.
    """

    def experts(
        name: str, passages: str = "retrieved", *, purpose: str = "gold", curve: bool = False, against: str = ""
    ) -> StudyRow:
        against_all = ("closed_book", *against.split())
        return StudyRow(name, "genpoe", purpose, passages, layers=main, curve=curve, against=against_all)

    def four(name: str, *, purpose: str = "hard", gates: str = "softmax") -> StudyRow:
        against = ("rag_four", "genpoe") if name == "genpoe_four" else ("rag_four", "genpoe_four")
        count = DISTRACTORS + 1
        return StudyRow(
            name, "genpoe", purpose, num_passages=count, gates=gates, layers=main, curve=True, against=against
        )

    rows = [
        StudyRow("closed_book", "closed_book", against=()),
        StudyRow("rag", "rag"),
        experts("genpoe", against="rag genpoe_shuffled"),
        StudyRow("genpoe_quarter", "genpoe", layers=quarter, against=("closed_book", "rag", "genpoe")),
        experts("genpoe_shuffled", "shuffled"),
        experts("genpoe_random", "random", curve=True),
        experts("genpoe_constant", "constant", curve=True),
        StudyRow("genpoe_rag", "genpoe_rag", layers=main, curve=True, against=("rag", "genpoe")),
        StudyRow("rag_four", "rag", "hard", num_passages=DISTRACTORS + 1, curve=True, against=("closed_book", "rag")),
        four("genpoe_four"),
        four("genpoe_four_equal", gates="uniform"),
        four("genpoe_four_wrong_first", purpose="wrong_first"),
    ]
    rows += [
        StudyRow(
            "genpoe_all_layers", "genpoe", layers=everything, curve=True, against=("closed_book", "rag", "genpoe")
        ),
        StudyRow("rag_retrieved", "rag", "retrieved", curve=True),
        experts("genpoe_retrieved", purpose="retrieved", curve=True, against="rag_retrieved"),
        experts("genpoe_none", "none", curve=True),
        StudyRow(
            "genpoe_rag_shuffled",
            "genpoe_rag",
            passages="shuffled",
            layers=main,
            curve=True,
            against=("closed_book", "rag"),
        ),
    ]
    if heads is not None:
        chosen = StudyRow(
            "genpoe_heads",
            "genpoe",
            layers=heads[1],
            heads=heads[2],
            checkpoint=heads[0],
            against=("closed_book", "rag", "genpoe", "genpoe_quarter"),
        )
        rows.insert([row.name for row in rows].index("genpoe_quarter") + 1, chosen)
    if quarter == main:
        rows = [row for row in rows if row.name != "genpoe_quarter"]
    rows += [
        StudyRow(f"layers_{size}", "genpoe", layers=layers, curve=True, against=("closed_book", "rag"))
        for size, layers in sets.items()
        if layers not in (main, quarter, everything)  # these have their own rows
    ]
    return rows
