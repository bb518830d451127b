"""``real-llm gates``: likelihoods of the model class, with gates computed here."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks.__main__ import main
from genpoe_plugin import GenPoEModel
from train_cli.main import main as genpoe


@pytest.fixture
def questions(tmp_path):
    texts = ["Rossini was born in Pesaro.", "Curie discovered radium.", "The capital is Canberra.", "Foxes jump."]
    rows = []
    for number in range(5):
        order = texts[number % 4 :] + texts[: number % 4]
        ctxs = [{"title": "", "text": text, "score": str(2.0 - rank)} for rank, text in enumerate(order)]
        rows.append({"question": f"what about {number}", "answers": [order[0].split()[-1]], "ctxs": ctxs})
    rows.append({**rows[0], "ctxs": rows[0]["ctxs"][:2]})  # too few passages
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_are_the_likelihoods_of_their_gates(llm_dir, questions, tmp_path):
    created = ["experts", "create", "--llm", str(llm_dir), "--layers", "0,2", "--out", str(tmp_path / "experts")]
    assert CliRunner().invoke(genpoe, created).exit_code == 0
    words = ["real-llm", "gates", "--llm", llm_dir, "--hypernetwork", tmp_path / "experts", "--questions", questions]
    words += ["--num-passages", 3, "--temperatures", "0.5,2", "--skip", 1]
    result = CliRunner().invoke(main, list(map(str, words)))
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stdout.splitlines() if line.startswith("|")]
    assert "gates of 3 passages" in lines[0] and "4 questions" in lines[0]
    found = {cells[1].strip(): float(cells[2].split()[0]) for cells in (line.split("|") for line in lines[2:])}
    model = GenPoEModel.from_pretrained(str(llm_dir), tmp_path / "experts", dtype="float32")
    rows = [json.loads(line) for line in questions.read_text().splitlines()[1:5]]

    def nats(gates):
        values = []
        for row in rows:
            passages = [[ctx["text"] for ctx in row["ctxs"][: len(gates)]]]
            (score,) = model.score([row["question"]], row["answers"], passages, [gates])
            values.append(-score / len(model.tokenizer(f" {row['answers'][0]}", add_special_tokens=False)["input_ids"]))
        return np.mean(values)

    def softmax(temperature):
        weights = np.exp(np.array([2.0, 1.0, 0.0]) / temperature)
        return tuple(weights / weights.sum())

    expected = {"one passage": (1.0,), "equal": (1 / 3,) * 3, "0.5": softmax(0.5), "2": softmax(2)}
    assert found == pytest.approx({name: nats(gates) for name, gates in expected.items()}, abs=1e-3)
    for option, value, message in (
        ("--num-passages", "5", "no question after the first 1 has 5 passages"),
        ("--temperatures", "0,1", "is not numbers above 0"),
        ("--temperatures", "x", "is not numbers above 0"),
    ):
        refused = CliRunner().invoke(main, [*map(str, words), option, value])
        assert refused.exit_code == 2 and message in refused.output, refused.output
