"""The hub's data sets, by the library that loads them, from folders laid out as the hub's repositories."""

from __future__ import annotations

from pathlib import Path

import pytest

from genpoe_plugin.data import hub_questions
from genpoe_plugin.data.hub_questions import read_hub_questions
from genpoe_plugin.errors import InputError
from tests.data.test_question_forms import plain
from tests.data_sets import EXPECTED, EXPECTED_OF_OTHERS, HUB_FILES, HUB_ROWS, write_parquet

SPLITS = {"narrativeqa": "test", "popqa": "test", "mquake": "CF3k", "conflict": "dev"}


@pytest.mark.parametrize("name", HUB_FILES)
def test_each_data_set(hub: Path, name: str) -> None:
    repository, split = HUB_FILES[name][0], SPLITS.get(name, "validation")
    questions = list(read_hub_questions(repository, split, need_answers=name != "unanswerable"))
    assert plain(questions) == (EXPECTED | EXPECTED_OF_OTHERS)[name]
    assert all(len({*question.answers}) == len(question.answers) for question in questions)


def test_all_that_can_be_named_are_tested() -> None:
    named = {value for key, value in vars(hub_questions).items() if key.isupper() and isinstance(value, str)}
    assert named == {repository for repository, _, _ in HUB_FILES.values()}


def test_other_splits_of_the_large_one_are_not_touched(hub: Path) -> None:
    """NarrativeQA's rows have the whole book each; all splits are gigabytes."""
    for split in ("train", "validation"):
        (hub / f"deepmind/narrativeqa/data/{split}-00000-of-00001.parquet").write_text("not to be read")
    assert plain(list(read_hub_questions("deepmind/narrativeqa", "test"))) == EXPECTED["narrativeqa"]


def test_another_form_is_one_line_with_the_row(hub: Path) -> None:
    file = hub / "rajpurkar/squad/plain_text/validation-00000-of-00001.parquet"
    write_parquet(file, [{**HUB_ROWS["squad"][0], "question": ""}])
    with pytest.raises(InputError, match=r"^rajpurkar/squad, validation, row 1: a question must be a non-empty string"):
        list(read_hub_questions("rajpurkar/squad", "validation"))


def test_a_damaged_download_is_one_line(hub: Path) -> None:
    (hub / "framolfese/2WikiMultihopQA/data/validation-00000-of-00001.parquet").write_text("not Parquet")
    with pytest.raises(InputError, match=r"^cannot load framolfese/2Wiki.* from the hub \(.*Parquet magic") as error:
        list(read_hub_questions("framolfese/2WikiMultihopQA", "validation"))
    assert "\n" not in str(error.value)
