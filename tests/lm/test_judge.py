"""The judge on one of lm_eval's model classes, against transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.synthetic_results import documents, write_run
from genpoe_plugin.errors import InputError
from genpoe_plugin.lm.judge import LMJudge
from train_cli.main import main

PROMPTS = ["Is it radium?\nRight (yes or no):", "Who wrote the opera about a barber?" * 3]
ARGUMENTS = "device=cpu,dtype=float32"


def test_log_likelihoods_are_those_of_transformers(llm_dir: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(llm_dir), AutoTokenizer.from_pretrained(llm_dir)
    judge = LMJudge(str(llm_dir), "hf", ARGUMENTS)
    assert judge.name == f"hf:pretrained={llm_dir},{ARGUMENTS}"
    for prompt, found in zip(PROMPTS, judge.log_likelihoods(PROMPTS, (" yes", " no")), strict=True):
        for continuation, value in zip((" yes", " no"), found, strict=True):
            before, whole = tokenizer(prompt)["input_ids"], tokenizer(prompt + continuation)["input_ids"]
            with torch.no_grad():
                logits = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
            expected = sum(logits[at - 1, whole[at]].item() for at in range(len(before), len(whole)))
            assert value == pytest.approx(expected, abs=1e-4)


def test_an_llm_that_cannot_be_loaded_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^--judge .*nothing: [^\n]+$"):
        LMJudge(str(tmp_path / "nothing")).log_likelihoods(PROMPTS, (" yes", " no"))


def test_a_judge_that_cannot_be_loaded_leaves_no_file(tmp_path: Path) -> None:
    write_run(tmp_path / "run", {"em": [1.0] * 4}, docs=documents(4, passages=1))
    run = CliRunner().invoke(main, ["compare", str(tmp_path / "run"), "--judge", str(tmp_path / "nothing")])
    assert run.exit_code == 2 and "cannot be loaded" in run.stderr
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["model"]


def test_compare_judges(llm_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    docs = documents(6, passages=1)
    write_run(tmp_path / "run", {"em": [1.0] * 3 + [0.0] * 3}, docs=docs)
    judged = ["--judge", str(llm_dir), "--judge-args", ARGUMENTS]
    run = CliRunner().invoke(main, ["compare", str(tmp_path / "run"), "--out", str(tmp_path / "out"), *judged])
    assert run.exit_code == 0, run.output
    assert "judged %" in run.output and f"judged is by hf:pretrained={llm_dir}" in " ".join(run.output.split())
    record = json.loads((tmp_path / "out" / "comparison.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "run" / "judgements.jsonl").read_text().splitlines()]
    mean = record["boards"][0]["systems"][0]["scores"]["judged"]["mean"]
    assert len(lines) == 6 and mean == sum(line["yes"] > line["no"] for line in lines) / 6
    # Saved judgements need no LLM.
    monkeypatch.setattr(LMJudge, "_lm", property(lambda self: pytest.fail("loaded")))
    again = CliRunner().invoke(main, ["compare", str(tmp_path / "run"), *judged])
    assert again.exit_code == 0 and "judged %" in again.output
    run = CliRunner().invoke(main, ["compare", str(tmp_path / "run"), "--judge-args", ARGUMENTS])
    assert run.exit_code == 2 and "there is no judge" in run.output
