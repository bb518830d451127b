"""What the demo's models are trained on, and the command that trains them; the training itself takes too long."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from experiments.demo_models import models
from experiments.demo_models.__main__ import main
from experiments.demo_models.documents import Documents
from genpoe_plugin.demo.lexicon import FIRST_NAMES, SURNAME_ENDS, SURNAME_STARTS
from genpoe_plugin.demo.world import side_of


def test_documents_for_pretraining_name_no_test_entity():
    documents = Documents(0)
    kinds = (documents.closed_book, documents.values, documents.statements, documents.brief, documents.rag)
    text = "".join(piece for kind in kinds for _ in range(10) for piece, _ in kind(4))
    people = {f"{first} {start}{end}" for first in FIRST_NAMES for start in SURNAME_STARTS for end in SURNAME_ENDS}
    named = {name for name in people if name in text}
    assert len(named) > 30
    assert {side_of(name) for name in people} == {"train", "test"}
    assert {side_of(name) for name in named} == {"train"}


def test_both_models_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(models, "pretrain_llm", lambda *arguments: made.append(arguments))
    monkeypatch.setattr(models, "pretrain_encoder", lambda *arguments: made.append(arguments))
    result = CliRunner().invoke(main, ["--out", str(tmp_path), "--seed", "5"])
    assert result.exit_code == 0, result.output
    assert made == [(tmp_path / "llm", 5), (tmp_path / "encoder", tmp_path / "llm", 5)]
