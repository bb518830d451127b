"""``genpoe train reranker`` through the command line."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from genpoe_plugin.selection.reranker_format import LIKELIHOOD
from genpoe_plugin.selection.reranking import Reranker
from genpoe_plugin.training.training_arguments import RerankerTraining
from tests.selection.test_reranking import likelihood_by_hand
from train_cli.main import main
from train_cli.train_reranker import reranker as command


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"query": "q", "pos": ["p"], "neg": ["n1", "n2"], "prompt": "Well?"}) + "\n")
    return path


def test_trains_and_says_where(llm_dir: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--max-steps", "2", "--lora-rank", "2", "--lora-targets", "q_proj,v_proj", "--validation", str(data)]
    arguments = ["train", "reranker", "--model", str(llm_dir), "--data", str(data), "--out", str(out), *options]
    run = CliRunner().invoke(main, arguments)
    assert run.exit_code == 0, run.output
    assert str(out) in run.stdout
    mrr, recall, _ = run.stdout.splitlines()
    assert mrr.startswith("mrr@10: ") and recall.startswith("recall@1: ") and " before training, " in recall
    assert Reranker.load(out).prompt == "Well?"
    record = json.loads((out / "training.json").read_text())
    assert record["arguments"]["lora_targets"] == ["q_proj", "v_proj"]
    assert len(record["losses"]) == 2
    assert [{*row} for row in record["validations"]] == [{"step", "recall@1", "mrr@10"}] * 2


def test_options_are_the_settings_with_their_defaults() -> None:
    settings = {field.name: field.default for field in dataclasses.fields(RerankerTraining)}
    options = {option.name: option.to_info_dict() for option in command.params}
    assert set(settings) <= set(options)
    for name in settings:
        assert options[name]["default"] == settings[name], name


def test_bad_input_is_one_line(llm_dir: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    llm = {
        "vocab_size": 400,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 8,
    }
    BertForSequenceClassification(BertConfig(**llm, num_labels=1)).save_pretrained(tmp_path / "bert")
    AutoTokenizer.from_pretrained(llm_dir).save_pretrained(tmp_path / "bert")
    for model, file, more in [
        (tmp_path / "nowhere", data, []),
        (llm_dir, tmp_path / "nothing.jsonl", []),
        (tmp_path / "bert", data, []),
        (llm_dir, data, ["--lora-rank", "-1"]),
    ]:
        run = CliRunner().invoke(
            main, ["train", "reranker", "--model", str(model), "--data", str(file), "--out", str(out), *more]
        )
        assert run.exit_code == 2
        assert run.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in run.stderr
        assert not out.exists()


def test_the_format_of_a_training_is_that_of_its_reranker(llm_dir: Path, data: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    options = ["--max-steps", "1", "--max-length", "64", "--batch-size", "2"]
    arguments = ["train", "reranker", "--data", str(data), *options]
    for model, out, more in ((llm_dir, first, ["--reranker-format", "likelihood"]), (first, second, [])):
        run = CliRunner().invoke(main, [*arguments, "--model", str(model), "--out", str(out), *more])
        assert run.exit_code == 0, run.output
        reranker = Reranker.load(out)
        assert reranker.format == LIKELIHOOD and reranker.max_length == 64
        assert json.loads((out / "reranker.json").read_text())["format"] == "likelihood"
    pairs = [("where?", "radium and polonium"), ("where?", "an opera")]
    expected = likelihood_by_hand(reranker.model, reranker.tokenizer, pairs)
    np.testing.assert_allclose(reranker.score(pairs), expected, rtol=1e-5, atol=1e-4)


def test_a_device_that_is_not_there(llm_dir: Path, data: Path, tmp_path: Path) -> None:
    arguments = ["--model", str(llm_dir), "--data", str(data), "--out", str(tmp_path / "out"), "--device", "abacus"]
    run = CliRunner().invoke(main, ["train", "reranker", *arguments])
    assert run.exit_code == 2
    assert run.stderr.splitlines()[-1].startswith("error: device abacus: cannot be used (")  # after the progress bar
    assert not (tmp_path / "out").exists()


def test_nothing_but_a_reranker_is_replaced(llm_dir: Path, data: Path, tmp_path: Path) -> None:
    """An LLM's directory, say, that one slip of the hand puts after --out."""
    llm = shutil.copytree(llm_dir, tmp_path / "llm")
    arguments = ["train", "reranker", "--model", str(llm_dir), "--data", str(data), "--max-steps", "1", "--out"]
    for out in (llm, data):
        run = CliRunner().invoke(main, [*arguments, str(out)])
        assert run.exit_code == 2
        last = run.stderr.splitlines()[-1]  # after the progress bar
        assert last == f"error: {out}: holds something that is not a training run; give another directory"
    assert {path.name for path in llm.iterdir()} == {path.name for path in llm_dir.iterdir()}
    assert data.is_file()
    for _ in range(2):
        run = CliRunner().invoke(main, [*arguments, str(tmp_path / "out")])
        assert run.exit_code == 0, run.output
