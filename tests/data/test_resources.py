"""The list of resources, and getting one from a server in this process or from a hub that is a stand-in."""

from __future__ import annotations

import json
import re
from pathlib import Path

import datasets
import pytest

from genpoe_plugin.data.questions import Question, read_questions
from genpoe_plugin.data.resources import RESOURCES, UNAVAILABLE, Resource, fetch, find, left_out
from genpoe_plugin.errors import InputError
from tasks.open_qa import HUB
from tests.data.test_question_forms import plain
from tests.data_sets import EXPECTED
from tests.http_files import serve

NAMES = [resource.name for resource in RESOURCES]


@pytest.mark.parametrize(
    ("name", "file", "path"),
    [
        (
            "data.wikipedia_split.psgs_w100",
            "wikipedia_split/psgs_w100.tsv.gz",
            "data/wikipedia_split/psgs_w100.tsv.gz",
        ),
        ("data.retriever.qas.nq-test", "data/retriever/nq-test.qa.csv", "data/retriever/qas/nq-test.csv"),
        (
            "data.retriever.qas.trivia-train",
            "data/retriever/trivia-train.qa.csv.gz",
            "data/retriever/qas/trivia-train.csv.gz",
        ),
        (
            "data.retriever_results.nq.single.train",
            "data/retriever_results/single/nq-train.json.gz",
            "data/retriever_results/nq/single/train.json.gz",
        ),
        (
            "data.gold_passages_info.nq_dev",
            "data/nq_gold_info/nq-dev_gold_info.json.gz",
            "data/gold_passages_info/nq_dev.json.gz",
        ),
        (
            "data.retriever.trivia-dev",
            "data/retriever/biencoder-trivia-dev.json.gz",
            "data/retriever/trivia-dev.json.gz",
        ),
    ],
)
def test_names_addresses_and_places_are_those_of_dpr(name: str, file: str, path: str) -> None:
    """As in the list of DPR's own downloader, which unpacks what we leave packed."""
    [resource] = find(name)
    assert resource.address == f"https://dl.fbaipublicfiles.com/dpr/{file}"
    assert resource.path("downloads") == Path("downloads") / path


def test_every_resource_is_one_file_that_is_no_pickle() -> None:
    assert len({*NAMES}) == len(NAMES) == 50
    assert len({resource.address for resource in RESOURCES}) == len(NAMES)
    assert len({resource.path("x") for resource in RESOURCES}) == len(NAMES)
    for resource in RESOURCES:
        assert resource.licence and resource.what
        assert resource.kind in ("passages", "questions", "questions with passages")
        assert re.search(r"\.(tsv|csv|json|jsonl)(\.gz)?$", resource.path("x").name)
        assert not any(resource.name.startswith(name) for name in UNAVAILABLE)


@pytest.mark.parametrize(
    ("prefix", "names"),
    [
        ("data.retriever.qas.nq", [f"data.retriever.qas.nq-{split}" for split in ("train", "dev", "test")]),
        ("data.retriever_results.nq.single.t", [f"data.retriever_results.nq.single.{x}" for x in ("train", "test")]),
        ("hub", [name for name in NAMES if name.startswith("hub.")]),
        ("data", [name for name in NAMES if name.startswith("data.")]),
        ("data.retriever.nq-dev", ["data.retriever.nq-dev"]),
    ],
)
def test_a_prefix_stands_for_all_below(prefix: str, names: list[str]) -> None:
    assert [resource.name for resource in find(prefix)] == names


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("data.retriever_results.trivia.train", "create them with `genpoe retrieve`"),
        ("data.retriever_results.nq.single.wikipedia_passages", "pickles.*`genpoe index build`"),
        ("data.retriever_results.nq.single-adv-hn.wikipedia_passages_0", "pickles.*`genpoe index build`"),
        ("data.reader.nq.single.train", "pickles"),
        ("indexes.single.nq.full.index", "`genpoe index build`"),
        ("checkpoint.retriever.single.nq.bert-base-encoder", "pickles.*facebook/dpr-ctx_encoder-single-nq-base"),
        ("pretrained", "on the hub"),
        ("original.narrativeqa", "`git clone` deepmind/narrativeqa"),
        ("original.2wiki.dev", r"use hub\.2wiki"),
        ("data.retriever.qas.nq_train", r"did you mean data\.retriever\.qas\.nq-train\?"),
        ("", "no such resource"),
    ],
)
def test_what_cannot_be_had_is_refused_with_advice(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        find(name)
    assert str(error.value).startswith(f"{name}: ")
    assert "\n" not in str(error.value)


def test_what_a_prefix_leaves_out_is_said() -> None:
    assert len(left_out("data.retriever_results.nq.single")) == 1
    assert len(left_out("data.retriever_results")) == 2
    assert left_out("data.retriever_results.nq.single.train") == left_out("data.retriever.qas") == []


def test_a_file_is_fetched_once_and_can_be_read(tmp_path: Path) -> None:
    with serve(b"who\t['Rossini']\n") as file:
        resource = Resource("data.retriever.qas.nq-train", f"{file.url}/nq.qa.csv", "questions", "NQ", "CC")
        path = tmp_path / "data/retriever/qas/nq-train.csv"
        assert fetch(resource, tmp_path) == (path, True)
        assert fetch(resource, tmp_path) == (path, False)
    assert list(read_questions(path)) == [Question("who", ("Rossini",))]


ROWS = {
    ("google-research-datasets/nq_open", None): {"question": "who", "answer": ["Rossini", "G. Rossini"]},
    ("mandarjoshi/trivia_qa", "unfiltered.nocontext"): {
        "question": "who",
        "answer": {"value": "Rossini", "aliases": ["G. Rossini", "Rossini"], "normalized_value": "rossini"},
    },
}


@pytest.mark.parametrize("name", ["hub.nq_open.train", "hub.trivia_qa.validation"])
def test_a_hub_data_set_becomes_a_file_of_questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    loaded = []

    def load_dataset(data_set: str, config: str | None, *, split: str) -> datasets.Dataset:
        loaded.append(split)
        return datasets.Dataset.from_list([ROWS[data_set, config]])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    [resource] = find(name)
    path, new = fetch(resource, tmp_path)
    assert new and path == tmp_path / (name.replace(".", "/") + ".jsonl")
    assert list(read_questions(path)) == [Question("who", ("Rossini", "G. Rossini"))]
    assert resource.address == json.loads(path.read_text().splitlines()[0])["source"]
    assert fetch(resource, tmp_path) == (path, False)
    assert loaded == [name.rpartition(".")[2]]


def test_passages_of_a_hub_data_set_are_in_the_file(tmp_path: Path, hub: Path) -> None:
    """And the tasks read it as they read the hub."""
    for name, file in (("hotpotqa", "hub.hotpotqa.validation"), ("mquake", "hub.mquake.cf3k")):
        [resource] = find(file)
        path, _ = fetch(resource, tmp_path)
        assert resource.kind == "questions with passages"
        assert plain(list(read_questions(path))) == EXPECTED[name]
    assert [question.case for question in read_questions(path)] == ["1561", "1561"]


def test_what_each_task_asks_can_be_downloaded() -> None:
    asked = {f"hub:{name}/{split}": f"what {task} asks" for task, (name, split) in HUB.items()}
    assert {resource.address for resource in RESOURCES if resource.address in asked} == {*asked}
    for resource in RESOURCES:
        assert resource.what.partition("; ")[2] == asked.get(resource.address, resource.what.partition("; ")[2])


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("original.squad.dev", "original/squad/dev.json"),
        ("original.mquake.cf-3k", "original/mquake/cf-3k.json"),
        ("original.popqa.test", "original/popqa/test.tsv"),
    ],
)
def test_places_of_the_authors_files(name: str, path: str) -> None:
    [resource] = find(name)
    assert resource.path("downloads") == Path("downloads") / path


def test_a_hub_out_of_reach_is_one_line(tmp_path: Path) -> None:
    [resource] = find("hub.nq_open.train")
    with pytest.raises(InputError, match="cannot load google-research-datasets/nq_open from the hub") as error:
        fetch(resource, tmp_path)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.rglob("*.jsonl"))
