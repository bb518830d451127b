"""The picture of the method: its numbers are those of the model and of the retriever."""

from __future__ import annotations

import math
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.__main__ import main
from benchmarks.real_llm.figure import draw, example
from genpoe_plugin import GenPoEModel
from genpoe_plugin.checkpoints.checkpoint import save_hypernetwork
from genpoe_plugin.data.passages import Passage
from genpoe_plugin.data.questions import RetrievedPassage
from genpoe_plugin.errors import InputError
from genpoe_plugin.experts.config import HypernetworkConfig
from genpoe_plugin.experts.hypernetwork import Hypernetwork
from train_cli.main import main as genpoe

QUESTION = "where was Rossini born"
TEXTS = ("Rossini was born in Pesaro.", "Curie discovered radium.", "The <capital> is $Canberra$ & old.")
SCORES = (0.7, 0.6, 0.5)


class Found:
    """A retriever that finds the same passages for every question."""

    def __init__(self, texts: tuple[str, ...] = TEXTS) -> None:
        self.texts = texts

    def retrieve(self, questions: list[str], most: int) -> list[list[RetrievedPassage]]:
        entries = [
            RetrievedPassage(Passage(str(rank), "", text), score, rank)
            for rank, (text, score) in enumerate(zip(self.texts, SCORES, strict=False), 1)
        ]
        return [entries[:most] for _ in questions]


def test_numbers_are_those_of_the_model(llm_dir: Path, tmp_path: Path) -> None:
    experts = tmp_path / "experts"
    words = ["experts", "create", "--llm", llm_dir, "--layers", "0,2", "--out", experts]
    assert CliRunner().invoke(genpoe, list(map(str, words))).exit_code == 0
    model = GenPoEModel.from_pretrained(llm_dir, experts)
    shown = example(model, Found(), QUESTION)
    weights = [math.exp((score - SCORES[0]) / 0.05) for score in SCORES]
    gates = [weight / sum(weights) for weight in weights]
    assert shown.gates == pytest.approx(gates) and shown.scores == SCORES
    assert shown.masses == pytest.approx(model.router_mass([QUESTION], [TEXTS], [gates])[0], abs=1e-6)
    alone = model.generate([QUESTION], mode="closed_book", max_new_tokens=16)[0]
    with_experts = model.generate([QUESTION], [TEXTS], [gates], max_new_tokens=16)[0]
    assert shown.answers == tuple(text.strip().partition("\n")[0].strip() for text in (alone, with_experts))
    assert (shown.layers, shown.num_layers) == ((0, 2), model.llm.config.num_hidden_layers)
    draw(shown, tmp_path / "figure.svg")
    assert ElementTree.parse(tmp_path / "figure.svg").getroot().tag.endswith("svg")
    drawn = (tmp_path / "figure.svg").read_bytes()
    draw(shown, tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").read_bytes() == drawn
    with pytest.raises(InputError, match="the index holds 2 passages; the figure needs 3"):
        example(model, Found(TEXTS[:2]), QUESTION)


def test_experts_beside_an_mlp_have_no_router(llm_dir: Path, tmp_path: Path) -> None:
    experts = tmp_path / "experts"
    llm, tokenizer = AutoModelForCausalLM.from_pretrained(llm_dir), AutoTokenizer.from_pretrained(llm_dir)
    config = HypernetworkConfig.from_dict({"hidden_size": 32, "layer": 1, "rank": 4, "expert_width": 16})
    save_hypernetwork(experts, Hypernetwork(config), llm, tokenizer, {})
    words = ["--llm", llm_dir, "--hypernetwork", experts, "--index", "none", "--question", QUESTION]
    result = CliRunner().invoke(main, ["real-llm", "figure", *map(str, words), "--out", str(tmp_path / "f.svg")])
    assert result.exit_code == 2 and "give experts in the attention" in result.output
    assert not (tmp_path / "f.svg").exists()
