"""``real-llm router``: shares computed from the model's router masses."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from benchmarks.__main__ import main
from genpoe_plugin import GenPoEModel
from train_cli.main import main as genpoe


@pytest.fixture
def questions(tmp_path):
    texts = ["Rossini was born in Pesaro.", "Curie discovered radium.", "The capital is Canberra."]
    rows = []
    for number, text in enumerate(texts):
        others = [other for other in texts if other != text]
        ctxs = [{"title": "", "text": one, "has_answer": one == text} for one in (others[0], text, others[1])]
        rows.append({"question": f"what about number {number}", "answers": [text.split()[-1]], "ctxs": ctxs})
    rows.append({**rows[0], "ctxs": rows[0]["ctxs"][:2]})  # too few passages
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_shares_are_those_of_the_marked_passages(llm_dir, questions, tmp_path):
    created = ["experts", "create", "--llm", str(llm_dir), "--layers", "0,2", "--out", str(tmp_path / "experts")]
    assert CliRunner().invoke(genpoe, created).exit_code == 0
    words = ["real-llm", "router", "--llm", llm_dir, "--hypernetwork", tmp_path / "experts", "--questions", questions]
    words += ["--num-passages", 3, "--json", tmp_path / "out.json"]
    result = CliRunner().invoke(main, list(map(str, words)))
    assert result.exit_code == 0, result.output
    assert "3 questions, 3 passages" in result.output and "by chance 0.333" in result.output
    found = json.loads((tmp_path / "out.json").read_text())
    model = GenPoEModel.from_pretrained(str(llm_dir), tmp_path / "experts", dtype="float32")
    for number, line in enumerate(questions.read_text().splitlines()[:3]):
        row = json.loads(line)
        (masses,) = model.router_mass([row["question"]], [[ctx["text"] for ctx in row["ctxs"]]])
        assert found["right"][number] == pytest.approx(masses[1] / sum(masses), abs=1e-6)
        assert found["experts"][number] == pytest.approx(sum(masses), abs=1e-6)
    none = CliRunner().invoke(main, [*map(str, words), "--num-passages", "4"])
    assert none.exit_code == 2 and "none of the questions has 4 passages" in none.output
