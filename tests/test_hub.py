"""Models on the hub: names, commits, tokens and pushing, with the real huggingface_hub and a fake server."""

from __future__ import annotations

import json
import re
from pathlib import Path

import peft
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from genpoe_plugin import GenPoEModel, HypernetworkCheckpoint, InputError
from genpoe_plugin.checkpoints.card import ModelCard
from genpoe_plugin.checkpoints.checkpoint import save_hypernetwork
from genpoe_plugin.experts.hypernetwork import Hypernetwork
from genpoe_plugin.hub import commit_of, split_revision
from genpoe_plugin.llm.empty_model import empty_model
from genpoe_plugin.llm.language_model import load_language_model
from genpoe_plugin.lm.hf import GenPoELM
from genpoe_plugin.selection.reranking import Reranker
from genpoe_plugin.training.creation import attention_config, create_attention_experts
from tests.hub_server import TOKEN

QUESTIONS = ["who wrote the opera about a barber"]
PASSAGES = [["Rossini: Gioachino Rossini was an Italian composer born in Pesaro in 1792.", "Pesaro: a city"]]
NEW = {"max_new_tokens": 6}


def write_experts(directory: Path, llm_dir: Path, layers: tuple[int, ...] = (0, 2)) -> Path:
    llm, tokenizer = AutoModelForCausalLM.from_pretrained(llm_dir), AutoTokenizer.from_pretrained(llm_dir)
    save_hypernetwork(directory, Hypernetwork(attention_config(llm, layers)), llm, tokenizer, {})
    return directory


@pytest.fixture
def experts(tmp_path: Path, llm_dir: Path) -> Path:
    return write_experts(tmp_path / "experts", llm_dir)


@pytest.fixture
def logged_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)


@pytest.mark.parametrize(
    ("name", "revision", "parts"),
    [
        ("user/name", None, ("user/name", None)),
        ("user/name@v1.2", None, ("user/name", "v1.2")),
        ("user/name@refs/pr/3", None, ("user/name", "refs/pr/3")),
        ("user/name", "v1.2", ("user/name", "v1.2")),
        ("user/name@v1.2", "v1.2", ("user/name", "v1.2")),
    ],
)
def test_a_name_and_its_revision(name, revision, parts):
    assert split_revision(name, revision) == parts


def test_a_directory_with_an_at_sign_is_a_directory(tmp_path):
    directory = tmp_path / "user@v1"
    directory.mkdir()
    assert split_revision(directory) == (str(directory), None)
    with pytest.raises(InputError, match="a directory, which has no revision v1"):
        split_revision(directory, "v1")


@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [("user/name@", None, "no revision after the @"), ("user/name@a", "b", "two revisions, a and b; give one")],
)
def test_a_revision_that_cannot_be(name, revision, message):
    with pytest.raises(InputError, match=message):
        split_revision(name, revision)


def test_a_revision_is_the_one_that_was_asked_for(model_hub, tmp_path, llm_dir, experts):
    first = model_hub.add("someone/experts", experts)
    model_hub.repositories["someone/experts"].branches["v1"] = first
    newer = write_experts(tmp_path / "newer", llm_dir, (1,))
    second = model_hub.add("someone/experts", newer)
    for name, revision, commit, directory in (
        ("someone/experts", None, second, newer),
        ("someone/experts@main", None, second, newer),
        ("someone/experts@v1", None, first, experts),
        ("someone/experts", "v1", first, experts),
        (f"someone/experts@{first}", None, first, experts),
    ):
        checkpoint = HypernetworkCheckpoint.from_pretrained(name, revision=revision)
        assert checkpoint.commit == commit
        assert checkpoint.fingerprint == HypernetworkCheckpoint.from_pretrained(directory).fingerprint
    assert HypernetworkCheckpoint.from_pretrained(experts).commit is None


def test_what_was_loaded_is_found_again_without_the_hub(model_hub, monkeypatch, experts):
    commit = model_hub.add("someone/experts", experts)
    online = HypernetworkCheckpoint.from_pretrained("someone/experts")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    num_requests = len(model_hub.requests)
    assert HypernetworkCheckpoint.from_pretrained("someone/experts") == online
    assert online.commit == commit and len(model_hub.requests) == num_requests


@pytest.mark.parametrize("name", ["someone/experts", "someone/experts@v1"])
def test_where_there_is_none_one_line_says_what_to_do(model_hub, name):
    with pytest.raises(InputError, match=f"{name}: neither a directory nor .*`hf auth login`") as error:
        HypernetworkCheckpoint.from_pretrained(name)
    assert "\n" not in str(error.value)


def test_a_revision_that_is_not_there_is_named(model_hub, experts):
    model_hub.add("someone/experts", experts)
    with pytest.raises(InputError, match=r"^hypernetwork someone/experts: the repository has no revision v9$"):
        HypernetworkCheckpoint.from_pretrained("someone/experts@v9")


@pytest.mark.parametrize("place", ["HF_TOKEN", "hf auth login"])
def test_a_private_one_needs_a_token_from_the_usual_places(model_hub, monkeypatch, tmp_path, experts, place):
    commit = model_hub.add("someone/experts", experts, private=True)
    with pytest.raises(InputError, match="neither a directory nor"):
        HypernetworkCheckpoint.from_pretrained("someone/experts")
    if place == "HF_TOKEN":
        monkeypatch.setenv("HF_TOKEN", TOKEN)
    else:
        (tmp_path / "hub-token").write_text(TOKEN)
    assert HypernetworkCheckpoint.from_pretrained("someone/experts").commit == commit
    assert {token for _, _, token in model_hub.requests[-3:]} == {TOKEN}


@pytest.mark.parametrize("revision", [None, "v1"])
def test_what_is_pushed_answers_alike(model_hub, logged_in, llm_dir, experts, revision):
    """A model that is pushed and loaded from the hub has the same answers and the same fingerprint."""
    model = GenPoEModel.from_pretrained(llm_dir, experts, dtype="float32")
    url = model.push_to_hub("someone/experts", revision=revision)
    repository = model_hub.repositories["someone/experts"]
    commit = repository.branches[revision or "main"]
    assert url == f"{model_hub.url}/someone/experts/commit/{commit}"
    assert ("model.safetensors" in repository.commits[repository.branches["main"]]) == (revision is None)
    reloaded = GenPoEModel.from_pretrained(llm_dir, "someone/experts", revision=revision, dtype="float32")
    assert reloaded.checkpoint.commit == commit
    assert reloaded.checkpoint.fingerprint == model.checkpoint.fingerprint
    expected = model.generate(QUESTIONS, PASSAGES, **NEW)
    assert reloaded.generate(QUESTIONS, PASSAGES, **NEW) == expected
    assert expected != model.generate(QUESTIONS, mode="closed_book", **NEW)


@pytest.mark.parametrize("with_card", [True, False])
def test_the_card_on_the_hub_has_an_example_that_runs(
    model_hub, logged_in, tmp_path, llm_dir, with_card, monkeypatch, capsys
):
    """The example loads the checkpoint from its repository. A checkpoint without a card gets one when it is pushed."""
    model_hub.add("someone/llm", llm_dir)
    llm, tokenizer = load_language_model("someone/llm")
    config, out = attention_config(llm, (0, 2)), tmp_path / "my-experts"
    if with_card:
        local_card = ModelCard(
            kind="experts",
            base_model="someone/llm",
            out=str(out),
            form={},
            data=[],
            arguments={},
            command=["genpoe", "experts", "create", "--out", str(out)],
            steps=0,
            licence="mit",
        )
        create_attention_experts(out, config, llm, tokenizer, card=local_card)
    else:
        save_hypernetwork(out, Hypernetwork(config), llm, tokenizer, {})
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    HypernetworkCheckpoint.from_pretrained(out).push_to_hub("someone/experts", revision="v1")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    repository = model_hub.repositories["someone/experts"]
    card = repository.commits[repository.branches["v1"]]["README.md"].decode()
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert (metadata["base_model"], metadata["library_name"]) == ("someone/llm", "genpoe")
    assert metadata["pipeline_tag"] == "question-answering"
    assert metadata.get("license") == ("mit" if with_card else None)
    assert str(tmp_path) not in card
    (example,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert '"someone/experts@v1"' in example
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})
    model = GenPoEModel.from_pretrained(llm_dir, out)
    passages = ["Rossini: Gioachino Rossini was born in Pesaro in 1792."]
    assert capsys.readouterr().out == f"{model.generate(['Where was Rossini born?'], [passages])}\n"


def test_a_card_comes_along_from_the_hub(model_hub, tmp_path, experts):
    for name in ("README.md", "curves.png", "notes.txt"):
        (experts / name).write_text(f"the {name}")
    model_hub.add("someone/experts", experts)
    HypernetworkCheckpoint.from_pretrained("someone/experts").save_pretrained(tmp_path / "copy")
    copied = {path.name: path.read_bytes() for path in (tmp_path / "copy").iterdir()}
    names = ("README.md", "curves.png", "config.json", "model.safetensors")
    assert copied == {name: (experts / name).read_bytes() for name in names}
    assert not any(path.is_symlink() for path in (tmp_path / "copy").iterdir())


def test_a_repository_is_made_as_private_as_asked_and_used_as_it_is(model_hub, logged_in, experts):
    checkpoint = HypernetworkCheckpoint.from_pretrained(experts)
    checkpoint.push_to_hub("mine", private=True)
    checkpoint.push_to_hub("mine")
    assert set(model_hub.repositories) == {"someone/mine"}
    assert model_hub.repositories["someone/mine"].private


@pytest.mark.parametrize("token", [None, "hf_of_a_reader"])
def test_who_may_not_push_is_told_so_in_one_line(model_hub, monkeypatch, experts, token):
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(InputError, match=r"someone/experts: cannot be pushed to the hub \(.*HF_TOKEN$") as error:
        HypernetworkCheckpoint.from_pretrained(experts).push_to_hub("someone/experts")
    assert "\n" not in str(error.value)
    assert not model_hub.repositories


def test_the_hub_out_of_reach_is_one_line(experts):
    """Tests without a fake server are offline."""
    checkpoint = HypernetworkCheckpoint.from_pretrained(experts)
    for name in ("someone/experts", "no/such/name"):
        with pytest.raises(InputError, match=f"{name}: cannot be pushed to the hub") as error:
            checkpoint.push_to_hub(name)
        assert "\n" not in str(error.value)


def test_llm_and_reranker_have_revisions_too(model_hub, tmp_path, llm_dir, make_llm, tokenizer):
    """One repository has two LLMs, one of them in another branch; rerankers are LLMs as well."""
    first = model_hub.add("someone/llm", llm_dir)
    model_hub.repositories["someone/llm"].branches["v1"] = first
    make_llm("llama", seed=1, num_hidden_layers=2).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    second = model_hub.add("someone/llm", tmp_path / "other")
    for name, layers, commit, directory in (
        ("someone/llm@v1", 3, first, llm_dir),
        ("someone/llm", 2, second, tmp_path / "other"),
    ):
        model, loaded_tokenizer = load_language_model(name)
        assert model.config.num_hidden_layers == layers and loaded_tokenizer.is_fast
        reranker = Reranker.load(name, format="bge")
        assert reranker.commit == commit
        assert reranker.fingerprint == Reranker.load(directory, format="bge").fingerprint
        assert empty_model(name).num_parameters() == empty_model(str(directory)).num_parameters()
    assert Reranker.load(llm_dir, format="bge").commit is None
    assert commit_of("someone/llm", "v1") == first
    with pytest.raises(InputError, match="someone/llm@v9"):
        load_language_model("someone/llm@v9")


def test_the_dtype_is_that_of_the_revision_where_weights_have_to_be_looked_at(model_hub, tmp_path, make_llm):
    """The weights must be read if the LLM's configuration has no dtype."""
    for branch, dtype in (("main", torch.float32), ("half", torch.bfloat16)):
        make_llm("llama").to(dtype).save_pretrained(tmp_path / branch)
        config = tmp_path / branch / "config.json"
        settings = json.loads(config.read_text())
        del settings["dtype"]
        config.write_text(json.dumps(settings))
        model_hub.add("someone/llm", tmp_path / branch, branch)
    assert empty_model("someone/llm").dtype == torch.float32
    assert empty_model("someone/llm@half").dtype == torch.bfloat16


def test_an_adapter_has_a_revision_that_its_base_model_lacks(model_hub, tmp_path, llm_dir):
    model_hub.add("someone/llm", llm_dir)
    llm = AutoModelForCausalLM.from_pretrained("someone/llm")
    adapted = peft.get_peft_model(llm, peft.LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"]))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight.data)
    adapted.save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(llm_dir).save_pretrained(tmp_path / "adapter")
    commit = model_hub.add("someone/adapter", tmp_path / "adapter")
    model_hub.repositories["someone/adapter"].branches["v1"] = commit
    expected = Reranker.load(tmp_path / "adapter", format="bge")
    assert expected.fingerprint != Reranker.load("someone/llm", format="bge").fingerprint
    for name in ("someone/adapter", "someone/adapter@v1"):
        reranker = Reranker.load(name, format="bge")
        assert (reranker.fingerprint, reranker.commit) == (expected.fingerprint, commit)


def test_commits_are_in_the_fingerprint_of_an_evaluation_and_nothing_else_changes(model_hub, llm_dir, experts):
    """Models from directories have no commit, so response caches of earlier runs stay valid."""
    commits = {
        "hypernetwork_commit": model_hub.add("someone/experts", experts),
        "commit": model_hub.add("someone/llm", llm_dir),
        "reranker_commit": model_hub.add("someone/reranker", llm_dir),
    }
    options = {"device": "cpu", "dtype": "float32", "reranker_format": "bge"}
    local = GenPoELM(str(llm_dir), hypernetwork=str(experts), reranker=str(llm_dir), **options)
    of_hub = GenPoELM("someone/llm", hypernetwork="someone/experts@main", reranker="someone/reranker", **options)
    assert not set(commits) & set(local.fingerprint)
    assert {**of_hub.fingerprint, "pretrained": str(llm_dir)} == {**local.fingerprint, **commits}
    (experts / "notes.txt").write_text("another commit with the same weights")
    moved = model_hub.add("someone/experts", experts)
    later = GenPoELM("someone/llm", hypernetwork="someone/experts@main", mode="genpoe", device="cpu", dtype="float32")
    assert later.fingerprint["hypernetwork_commit"] == moved
    assert later.fingerprint["hypernetwork"] == of_hub.fingerprint["hypernetwork"]
