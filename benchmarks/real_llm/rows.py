"""The rows of a study, the most important first: each is one run of lm_eval."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.real_llm.layers import Heads, Layers
from benchmarks.real_llm.questions import DISTRACTORS


@dataclass(frozen=True)
class StudyRow:
    """One run of lm_eval over all data sets.

    Attributes:
        mode, passages, num_passages, gates: arguments of the genpoe model.
        purpose: of the file of questions (`benchmarks.real_llm.questions.PURPOSES`).
        layers: that hold the experts; none in modes without experts.
        heads: key-value heads of the layers, where not all.
        checkpoint: of the experts; without it that of the study, which has all layers.
        adapter: of the LLM, that has learned to read its prompt.
        expert_dtype: in which experts are kept, where not in the LLM's.
        curve: asked with the smaller number of questions.
        against: rows that it is compared with, question by question.
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
        """Whether its experts are those of the right passage alone, with nothing in the prompt."""
        return (self.mode, self.purpose, self.passages) == ("genpoe", "gold", "retrieved")


MEANINGS = {
    "closed_book": "the LLM alone",
    "rag": "the right passage in the prompt",
    "genpoe": "the right passage as experts",
    "genpoe_quarter": "the same in at most a quarter of the layers",
    "genpoe_heads": "the right passage as experts of chosen key-value heads, in as many bytes as genpoe_quarter",
    "genpoe_all_layers": "the right passage as experts in all layers",
    "genpoe_shuffled": "another question's passage as experts",
    "genpoe_rag": "the right passage in the prompt and as experts",
    "rag_retrieved": "the passage that MiniLM finds first, in the prompt",
    "genpoe_retrieved": "the passage that MiniLM finds first, as experts",
    "genpoe_random": "as experts a passage drawn at random that has no answer",
    "genpoe_constant": "one passage as experts, the same for all questions",
    "genpoe_none": "the model of `genpoe` without any passage: it has to equal `closed_book`",
    "genpoe_rag_shuffled": "another question's passage in the prompt and as experts",
    "rag_four": f"the right passage and {DISTRACTORS} hard distractors in the prompt, the right one first",
    "genpoe_four": "the same four as experts; a distractor has a seventh of the right one's gate",
    "genpoe_four_equal": "the same four as experts with equal gates",
    "genpoe_four_wrong_first": "the same four as experts; a distractor has the great gate, the right one a seventh",
    "layers_N": "the right passage as experts in N layers",
}
"""What each row is; an LLM has as many `layers_N` as it has sets of layers."""


def study_rows(
    sets: dict[int, Layers],
    main: Layers,
    quarter: Layers,
    everything: Layers,
    heads: tuple[Path, Layers, Heads] | None = None,
) -> list[StudyRow]:
    """All rows of a study.

    Args:
        sets: layers by their number.
        main: the layers of all rows but those on layers.
        quarter: of the row that names it.
        everything: all layers of the LLM.
        heads: checkpoint, its layers and their key-value heads, of the row that names them.
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
        if layers not in (main, quarter, everything)  # which have rows of their own
    ]
    return rows
