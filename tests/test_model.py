"""The Python interface: the same answers as the lm-eval model, as the LLM's own generate, and as a loop by hand."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from lm_eval.api.instance import Instance
from transformers import AutoModelForCausalLM, AutoTokenizer

import genpoe_plugin
from genpoe_plugin import GenPoEModel
from genpoe_plugin.checkpoint import save_hypernetwork
from genpoe_plugin.errors import InputError
from genpoe_plugin.experts.attention import attend
from genpoe_plugin.experts.attention_interface import listening
from genpoe_plugin.experts.config import HypernetworkConfig
from genpoe_plugin.experts.creation import attention_config
from genpoe_plugin.experts.hypernetwork import Hypernetwork
from genpoe_plugin.lm import GenPoELM
from genpoe_plugin.prompts import MODES, closed_book_prompt, rag_prompt
from train_cli.main import main

QUESTIONS = ["where was Rossini born", "who discovered radium, and in which year was that"]
PASSAGES = [
    ["Rossini: Gioachino Rossini was an Italian composer born in Pesaro in 1792.", "Pesaro: a city"],
    ["Marie Curie: Marie Curie discovered polonium and radium."],
]
GATES = [[0.75, 0.25], [1.0]]
NEW = {"max_new_tokens": 6}


@pytest.fixture(params=["attention", "dense"])
def checkpoint(request, llm_dir, tmp_path) -> Path:
    """Experts that change what the LLM says."""
    llm, tokenizer = AutoModelForCausalLM.from_pretrained(llm_dir), AutoTokenizer.from_pretrained(llm_dir)
    if request.param == "attention":
        config = attention_config(llm, (0, 2))
    else:
        form = {"hidden_size": 32, "layer": 1, "rank": 4, "expert_width": 16, "code_size": 24}
        config = HypernetworkConfig.from_dict({**form, "base": "random", "generator_gain": 4.0})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_hypernetwork(tmp_path / "experts", Hypernetwork(config), llm, tokenizer, {})
    return tmp_path / "experts"


@pytest.fixture
def model(llm_dir, checkpoint) -> GenPoEModel:
    return GenPoEModel.from_pretrained(str(llm_dir), checkpoint, dtype="float32")


@pytest.mark.parametrize("mode", MODES)
def test_answers_are_those_of_the_lm_eval_model(model, llm_dir, checkpoint, mode):
    """Which stops at a line break, and here never meets one."""
    more = {} if mode in ("closed_book", "rag") else {"hypernetwork": str(checkpoint)}
    lm = GenPoELM(str(llm_dir), mode=mode, device="cpu", dtype="float32", batch_size=2, gates="uniform", **more)
    requests = []
    for number, (question, own) in enumerate(zip(QUESTIONS, PASSAGES, strict=True)):
        titled = [entry.partition(": ")[::2] for entry in own]
        ctxs = [{"id": str(place), "title": title, "text": text} for place, (title, text) in enumerate(titled)]
        doc = {"question": question, "answers": ["x"], "ctxs": ctxs}
        arguments = (closed_book_prompt(question), {"until": ["\n\n\n"], "max_gen_toks": 6, "do_sample": False})
        requests.append(Instance("generate_until", doc, arguments, 0, metadata=("t", number, 1)))
    expected = lm.generate_until(requests, disable_tqdm=True)
    assert model.generate(QUESTIONS, PASSAGES, mode=mode, **NEW) == expected


def test_closed_book_is_the_llms_own_generate_and_rag_that_of_its_prompt(model, llm_dir):
    llm, tokenizer = AutoModelForCausalLM.from_pretrained(llm_dir), AutoTokenizer.from_pretrained(llm_dir)
    for mode, prompts in (
        ("closed_book", [closed_book_prompt(question) for question in QUESTIONS]),
        ("rag", [rag_prompt(question, own) for question, own in zip(QUESTIONS, PASSAGES, strict=True)]),
    ):
        for prompt, answer in zip(prompts, model.generate(QUESTIONS, PASSAGES, mode=mode, **NEW), strict=True):
            ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
            new = llm.generate(ids, do_sample=False, **NEW)[0, ids.shape[1] :]
            assert answer == tokenizer.decode(new, skip_special_tokens=True)


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_is_its_questions_one_by_one(model, mode):
    questions, passages = [*QUESTIONS, QUESTIONS[0]], [*PASSAGES, []]
    gates = [*GATES, []]
    together = model.generate(questions, passages, gates, mode=mode, **NEW)
    alone = [model.generate(questions, passages, gates, mode=mode, batch_size=1, **NEW)]
    assert together == alone[0]
    assert together[2] == model.generate(QUESTIONS[:1], mode="closed_book", **NEW)[0], "without passages"


def test_experts_in_a_loop_by_hand_are_those_of_generate(model):
    ids = torch.tensor([model.tokenizer(closed_book_prompt(QUESTIONS[0]))["input_ids"]])
    begin = ids.shape[1]
    with model.experts(PASSAGES[:1], GATES[:1]), torch.no_grad():
        for _ in range(NEW["max_new_tokens"]):
            ids = torch.cat([ids, model.llm(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    expected = model.generate(QUESTIONS[:1], PASSAGES[:1], GATES[:1], **NEW)
    assert model.tokenizer.decode(ids[0, begin:], skip_special_tokens=True) == expected[0]
    assert model.generate(QUESTIONS[:1], **NEW) != expected, "they change the answer, and are gone afterwards"


def test_a_score_is_the_sum_over_the_answers_tokens(model):
    (score, _) = model.score(QUESTIONS, ["Pesaro", "radium"], PASSAGES, GATES)
    prompt = closed_book_prompt(QUESTIONS[0])
    known = len(model.tokenizer(prompt)["input_ids"])
    ids = model.tokenizer(f"{prompt} Pesaro")["input_ids"]
    expected = 0.0
    with model.experts(PASSAGES[:1], GATES[:1]), torch.no_grad():
        for place in range(known, len(ids)):
            logits = model.llm(torch.tensor([ids[:place]]), use_cache=False).logits[0, -1].double()
            expected += logits.log_softmax(-1)[ids[place]].item()
    assert score == pytest.approx(expected, abs=1e-4)
    assert model.score(QUESTIONS[:1], ["Pesaro"], mode="closed_book") != [score]


def test_what_is_saved_answers_alike(model, llm_dir, tmp_path):
    model.save_pretrained(tmp_path / "copy")
    again = GenPoEModel.from_pretrained(str(llm_dir), tmp_path / "copy", dtype="float32")
    assert again.generate(QUESTIONS, PASSAGES, GATES, **NEW) == model.generate(QUESTIONS, PASSAGES, GATES, **NEW)
    names = {path.name for path in (tmp_path / "copy").iterdir()}
    assert names == {"config.json", "model.safetensors"}


def test_what_is_pushed_is_the_checkpoint(model, checkpoint, monkeypatch):
    seen = {}

    class Api:
        def create_repo(self, name, **options):
            seen["repository"] = name

        def create_branch(self, name, *, branch, exist_ok):
            seen["branch"] = branch

        def upload_folder(self, *, repo_id, folder_path, revision):
            seen["files"] = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
            return type("Commit", (), {"commit_url": f"https://hub/{repo_id}/{revision}"})()

    monkeypatch.setattr("genpoe_plugin.model.HfApi", Api)
    assert model.push_to_hub("someone/experts", revision="v1") == "https://hub/someone/experts/v1"
    assert (seen["repository"], seen["branch"]) == ("someone/experts", "v1")
    assert seen["files"] == {path.name: path.read_bytes() for path in checkpoint.iterdir()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "oracle"}, "mode=oracle: not one of closed_book, rag, genpoe, genpoe_rag"),
        ({"passages": PASSAGES[:1]}, "2 questions, but passages for 1"),
        ({"passages": ["a", "b"]}, "passages a list for each question"),
        ({"passages": PASSAGES, "gates": [[1.0], [1.0]]}, "gates have to be as many as the passages"),
        ({"passages": PASSAGES, "gates": [[1.0, -1.0], [1.0]]}, "a gate is negative"),
    ],
)
def test_bad_input_is_one_line(model, arguments, message):
    with pytest.raises(InputError, match=message):
        model.generate(QUESTIONS, **arguments)


def test_importing_the_package_imports_no_torch():
    code = "import sys, genpoe_plugin; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = genpoe_plugin.Nothing


def test_the_readmes_example_runs(llm_dir, checkpoint, tmp_path, monkeypatch, capsys):
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(from genpoe_plugin import GenPoEModel\n.*?)```", readme, re.DOTALL)
    example = example.replace("Qwen/Qwen2.5-0.5B-Instruct", str(llm_dir)).replace('"my-experts"', repr(str(checkpoint)))
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {"__name__": "__main__"})
    assert len(capsys.readouterr().out.splitlines()) >= 2
    assert (tmp_path / "my-copy" / "config.json").is_file()


def test_ask_shows_every_mode(llm_dir, checkpoint):
    words = ["ask", QUESTIONS[0], "--model", llm_dir, "--hypernetwork", checkpoint, "--passage", PASSAGES[0][0]]
    result = CliRunner().invoke(main, [*map(str, words), "--max-new-tokens", "4", "--dtype", "float32"])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines[:4]] == list(MODES)
    shares = [line for line in lines[4:] if "% of the attention, as experts: Rossini" in line]
    assert len(shares) == (GenPoEModel.from_pretrained(str(llm_dir), checkpoint).has_router)
    missing = CliRunner().invoke(main, [*map(str, words[:4]), "--hypernetwork", "no/such", "--passage", "a"])
    assert missing.exit_code == 2 and "neither a directory nor a repository" in missing.stderr


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_routers_mass_is_that_of_a_softmax_written_out(llm_dir, tmp_path, implementation):
    """Of the prompt's last token over the own context and all units, for every head and layer by itself."""
    llm = AutoModelForCausalLM.from_pretrained(llm_dir, attn_implementation=implementation).double()
    tokenizer = AutoTokenizer.from_pretrained(llm_dir)
    save_hypernetwork(tmp_path / "experts", Hypernetwork(attention_config(llm, (0, 2))), llm, tokenizer, {})
    model = GenPoEModel(llm, tokenizer, tmp_path / "experts")
    (found,) = model.router_mass(QUESTIONS[:1], PASSAGES[:1], GATES[:1])
    rows = model._store.rows(PASSAGES[:1], GATES[:1], [0])
    units, seen = model._store.units(PASSAGES[0]), {}

    def note(call):
        seen[call.layer] = call
        active = torch.ones(1, call.query.shape[2], dtype=torch.bool)
        return attend(call, rows.experts.layer(call.layer, rows.gates), active), None

    with listening(llm, (0, 2), note), torch.no_grad():
        llm(torch.tensor([tokenizer(closed_book_prompt(QUESTIONS[0]))["input_ids"]]))
    expected = torch.zeros(len(units), dtype=torch.float64)
    for number, layer in enumerate((0, 2)):
        call, keys = seen[layer], rows.experts.parts[2 * number][0]
        heads, group = call.query.shape[1], call.query.shape[1] // call.key.shape[1]
        for head in range(heads):
            query = call.query[0, head, -1]
            of_units = [float(query @ key[head // group]) * call.scaling for key in keys]
            gates = [gate for gate, count in zip(GATES[0], units, strict=True) for _ in range(count)]
            masses = [g / max(GATES[0]) * math.exp(logit) for g, logit in zip(gates, of_units, strict=True)]
            context = sum(math.exp(float(query @ key) * call.scaling) for key in call.key[0, head // group])
            total = sum(masses) + context
            begin = 0
            for place, count in enumerate(units):
                expected[place] += sum(masses[begin : begin + count]) / total / heads / 2
                begin += count
    assert found == pytest.approx(expected.tolist(), abs=1e-6)
    assert 0 < sum(found) < 1


def test_only_experts_in_the_attention_have_a_router(model):
    if model.has_router:
        with pytest.raises(InputError, match="question 1 has no passage"):
            model.router_mass(QUESTIONS, [PASSAGES[0], []])
    else:
        with pytest.raises(InputError, match="a router for experts in the attention alone"):
            model.router_mass(QUESTIONS, PASSAGES)
