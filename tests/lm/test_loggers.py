"""Our facts in the results, in the hands of lm-eval's loggers for Weights & Biases and for the hub."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from lm_eval.loggers import EvaluationTracker, WandbLogger


class StandIn(types.ModuleType):
    """The part of wandb that lm-eval's logger calls."""

    __version__ = "0.19.0"

    def __init__(self, folder: Path) -> None:
        super().__init__("wandb")
        self.folder = folder
        self.run: Any = None
        self.config: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        self.logged: dict[str, Any] = {}
        self.rows: list[tuple[Any, ...]] = []

    def init(self, **options: Any) -> Any:
        artifacts: list[Any] = []
        self.run = types.SimpleNamespace(
            config=types.SimpleNamespace(update=lambda values, **_: self.config.update(values)),
            summary=types.SimpleNamespace(update=self.summary.update),
            log=lambda values, step=None: self.logged.update(values),
            log_artifact=artifacts.append,
        )
        return self.run

    def Table(self, columns: list[str]) -> Any:
        return types.SimpleNamespace(add_data=lambda *row: self.rows.append(row))

    def Artifact(self, name: str, type: str) -> Any:
        path = self.folder / name
        return types.SimpleNamespace(new_file=lambda file, mode, encoding: path.open(mode, encoding=encoding))


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> StandIn:
    module = StandIn(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr("lm_eval.loggers.wandb_logger.get_wandb_printer", lambda: None)
    return module


@pytest.mark.parametrize("mode", ["genpoe", "rag"])
def test_weights_and_biases_gets_plain_values(make_lm, evaluate, wandb: StandIn, tmp_path, mode):
    results = evaluate(make_lm(mode), "genpoe_demo", gen_kwargs="max_gen_toks=4", log_samples=False)
    logger = WandbLogger({"project": "p"})
    logger.post_init(results)
    logger.log_eval_result()
    metrics = {name for name in results["results"]["genpoe_demo"] if name.endswith(",none")}
    names = {f"genpoe_demo/{name.removesuffix(',none')}" for name in metrics}
    assert {"genpoe_demo/em", "genpoe_demo/f1"} < names <= {*wandb.logged, *wandb.summary}
    assert isinstance(wandb.logged["genpoe_demo/em"], float)
    assert {row[4] for row in wandb.rows} >= {"em", "f1"}
    facts = json.loads(json.dumps(wandb.config["cli_configs"]["genpoe"]))  # nothing in it is an object of ours
    assert facts["questions"] > 0 and facts["first_token_seconds"] > 0
    assert json.loads((tmp_path / "results").read_text())["config"]["genpoe"] == facts


def test_the_hub_gets_a_json_file(make_lm, evaluate, tmp_path):
    tracker = EvaluationTracker(output_path=str(tmp_path))
    results = evaluate(make_lm(), "genpoe_demo", gen_kwargs="max_gen_toks=4", evaluation_tracker=tracker)
    samples = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples)
    (path,) = tmp_path.rglob("results_*.json")
    facts = json.loads(path.read_text())["config"]["genpoe"]
    # Without lm-eval's fallback for objects that are not JSON.
    assert json.loads(json.dumps(results["config"]["genpoe"])) == facts
    assert facts["expert_bytes"] > 0
