"""The Python interface gives the same answers as the lm-eval model, the LLM's own generate, and a manual loop."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from lm_eval.api.instance import Instance
from scipy.special import softmax
from transformers import AutoModelForCausalLM, AutoTokenizer

import genpoe_plugin
from genpoe_plugin import GenPoEModel, HypernetworkCheckpoint
from genpoe_plugin.checkpoints.checkpoint import save_hypernetwork
from genpoe_plugin.errors import InputError
from genpoe_plugin.experts.attention import attend
from genpoe_plugin.experts.attention_interface import intercept_attention
from genpoe_plugin.experts.config import HypernetworkConfig
from genpoe_plugin.experts.hypernetwork import Hypernetwork
from genpoe_plugin.lm.hf import GenPoELM
from genpoe_plugin.prompts import MODES, closed_book_prompt, rag_prompt
from genpoe_plugin.training.creation import attention_config
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
    """A hypernetwork whose experts change the LLM's answers."""
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


@pytest.mark.parametrize("temperature", [1.0, 0.25, 8])
def test_gates_of_scores(temperature):
    scores = [[2.5, -1.0, 0.5], [7.0]]
    *computed, without_scores = GenPoEModel.gates([*scores, []], temperature)
    assert without_scores == ()
    for question_scores, gates in zip(scores, computed, strict=True):
        np.testing.assert_allclose(gates, softmax(np.array(question_scores, np.float64) / temperature), rtol=1e-12)
    assert temperature != 1 or GenPoEModel.gates(scores) == computed


@pytest.mark.parametrize(
    ("scores", "temperature", "message"),
    [
        ([[1.0]], 0, "gate_temperature=0: give a finite number above 0"),
        ([[1.0]], "hot", "gate_temperature=hot: give a finite number above 0"),
        ([[1.0], [0.5, float("nan")]], 1.0, "question 1: a score is not a finite number"),
    ],
)
def test_invalid_scores_and_temperatures(scores, temperature, message):
    with pytest.raises(InputError, match=message):
        GenPoEModel.gates(scores, temperature)


@pytest.mark.parametrize("mode", MODES)
def test_answers_are_those_of_the_lm_eval_model(model, llm_dir, checkpoint, mode):
    """The lm-eval model would stop at three line breaks, which do not occur here."""
    options = {} if mode in ("closed_book", "rag") else {"hypernetwork": str(checkpoint)}
    lm = GenPoELM(str(llm_dir), mode=mode, device="cpu", dtype="float32", batch_size=2, gates="uniform", **options)
    requests = []
    for number, (question, passages) in enumerate(zip(QUESTIONS, PASSAGES, strict=True)):
        titled = [passage.partition(": ")[::2] for passage in passages]
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
        ("rag", [rag_prompt(question, passages) for question, passages in zip(QUESTIONS, PASSAGES, strict=True)]),
    ):
        for prompt, answer in zip(prompts, model.generate(QUESTIONS, PASSAGES, mode=mode, **NEW), strict=True):
            ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
            generated = llm.generate(ids, do_sample=False, **NEW)[0, ids.shape[1] :]
            assert answer == tokenizer.decode(generated, skip_special_tokens=True)


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_is_its_questions_one_by_one(model, mode):
    questions, passages = [*QUESTIONS, QUESTIONS[0]], [*PASSAGES, []]
    gates = [*GATES, []]
    together = model.generate(questions, passages, gates, mode=mode, **NEW)
    assert together == model.generate(questions, passages, gates, mode=mode, batch_size=1, **NEW)
    assert together[2] == model.generate(QUESTIONS[:1], mode="closed_book", **NEW)[0], "without passages"


def test_experts_in_a_loop_by_hand_are_those_of_generate(model):
    ids = torch.tensor([model.tokenizer(closed_book_prompt(QUESTIONS[0]))["input_ids"]])
    prompt_length = ids.shape[1]
    with model.experts(PASSAGES[:1], GATES[:1]), torch.no_grad():
        for _ in range(NEW["max_new_tokens"]):
            ids = torch.cat([ids, model.llm(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    expected = model.generate(QUESTIONS[:1], PASSAGES[:1], GATES[:1], **NEW)
    assert model.tokenizer.decode(ids[0, prompt_length:], skip_special_tokens=True) == expected[0]
    assert model.generate(QUESTIONS[:1], **NEW) != expected, "experts change the answer, and act only in the block"


def test_a_score_is_the_sum_over_the_answers_tokens(model):
    (score, _) = model.score(QUESTIONS, ["Pesaro", "radium"], PASSAGES, GATES)
    prompt = closed_book_prompt(QUESTIONS[0])
    prompt_length = len(model.tokenizer(prompt)["input_ids"])
    ids = model.tokenizer(f"{prompt} Pesaro")["input_ids"]
    expected = 0.0
    with model.experts(PASSAGES[:1], GATES[:1]), torch.no_grad():
        for position in range(prompt_length, len(ids)):
            logits = model.llm(torch.tensor([ids[:position]]), use_cache=False).logits[0, -1].double()
            expected += logits.log_softmax(-1)[ids[position]].item()
    assert score == pytest.approx(expected, abs=1e-4)
    assert model.score(QUESTIONS[:1], ["Pesaro"], mode="closed_book") != [score]


def test_a_batched_loop_by_hand_with_a_cache_and_passages_in_the_prompt(model):
    """Experts act from the start position of each row, which is that of the question."""
    prompts = [rag_prompt(question, passages) for question, passages in zip(QUESTIONS, PASSAGES, strict=True)]
    encoded = model.tokenizer(prompts, return_tensors="pt", padding=True)
    before = [prompt[: prompt.index("Question:")] for prompt in prompts]
    start = [len(model.tokenizer(text)["input_ids"]) for text in before]
    mask, ids, cache, generated = encoded["attention_mask"], encoded["input_ids"], None, []
    with model.experts(PASSAGES, GATES, start), torch.no_grad():
        for _ in range(NEW["max_new_tokens"]):
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            output = model.llm(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
            cache, ids = output.past_key_values, output.logits[:, -1:].argmax(-1)
            generated.append(ids)
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
    expected = model.generate(QUESTIONS, PASSAGES, GATES, mode="genpoe_rag", **NEW)
    assert model.tokenizer.batch_decode(torch.cat(generated, 1), skip_special_tokens=True) == expected
    assert expected != model.generate(QUESTIONS, PASSAGES, GATES, mode="rag", **NEW)


def test_an_llm_that_is_loaded_already(model, llm_dir, checkpoint):
    llm, tokenizer = AutoModelForCausalLM.from_pretrained(llm_dir), AutoTokenizer.from_pretrained(llm_dir)
    before = {name: weight.clone() for name, weight in llm.state_dict().items()}
    loaded = GenPoEModel.from_pretrained(
        llm.train(), HypernetworkCheckpoint.from_pretrained(checkpoint), tokenizer=tokenizer
    )
    assert loaded.llm is llm and not llm.training
    assert loaded.generate(QUESTIONS, PASSAGES, GATES, **NEW) == model.generate(QUESTIONS, PASSAGES, GATES, **NEW)
    assert all(torch.equal(weight, before[name]) for name, weight in llm.state_dict().items())


@pytest.mark.parametrize(
    ("loaded", "arguments", "message"),
    [
        (True, {}, "a loaded LLM needs its tokenizer; give tokenizer="),
        (True, {"dtype": "float32"}, "dtype=float32: the LLM is already loaded"),
        (True, {"device": "cpu"}, "device=cpu: the LLM is already loaded"),
        (False, {"tokenizer": "its"}, "tokenizer: an LLM that is given by name is loaded with its own"),
        (False, {"dtype": "float8"}, "dtype float8: no such dtype"),
        (False, {"expert_dtype": "float8"}, "expert_dtype=float8: not one of"),
        (False, {"revision": "v1"}, "a directory, which has no revision v1"),
        (False, {"hypernetwork": "no/such"}, "no/such: neither a directory nor a reachable hub repository"),
    ],
)
def test_what_cannot_be_loaded_is_one_line(llm_dir, checkpoint, loaded, arguments, message):
    llm = AutoModelForCausalLM.from_pretrained(llm_dir) if loaded else llm_dir
    with pytest.raises(InputError, match=message) as error:
        GenPoEModel.from_pretrained(llm, **{"hypernetwork": checkpoint, **arguments})
    assert "\n" not in str(error.value)


def test_a_slow_tokenizer_is_refused(llm_dir, checkpoint, tokenizer):
    class Slow:
        is_fast = False

    with pytest.raises(InputError, match="has no character offsets"):
        GenPoEModel(AutoModelForCausalLM.from_pretrained(llm_dir), Slow(), checkpoint)


def test_an_answer_ends_at_a_stop_string(model):
    (whole,) = model.generate(QUESTIONS[:1], PASSAGES[:1], max_new_tokens=12, stop_strings=None)
    stop = whole[4:6]
    for stops in (stop, ["never there", stop]):
        assert model.generate(QUESTIONS[:1], PASSAGES[:1], max_new_tokens=12, stop_strings=stops) == [
            whole[: whole.index(stop)]
        ]


def test_no_questions_have_no_answers(model):
    assert model.generate([], []) == model.score([], [], []) == []


def test_a_long_passage_is_cut_where_a_reader_would_be_told(model):
    """Passages are cut to 256 tokens in every mode, as in an evaluation."""
    long = "Rossini: " + "Gioachino Rossini was an Italian composer. " * 60
    offsets = model.tokenizer(long, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    cut = long[: offsets[256][0]].rstrip()
    for mode in MODES:
        assert model.generate(QUESTIONS[:1], [[long]], mode=mode, **NEW) == model.generate(
            QUESTIONS[:1], [[cut]], mode=mode, **NEW
        )


def test_what_is_saved_answers_alike(model, llm_dir, tmp_path):
    model.save_pretrained(tmp_path / "copy")
    reloaded = GenPoEModel.from_pretrained(llm_dir, tmp_path / "copy", dtype="float32")
    assert reloaded.generate(QUESTIONS, PASSAGES, GATES, **NEW) == model.generate(QUESTIONS, PASSAGES, GATES, **NEW)
    assert reloaded.checkpoint.fingerprint == model.checkpoint.fingerprint
    names = {path.name for path in (tmp_path / "copy").iterdir()}
    assert names == {"config.json", "model.safetensors"}


def test_saving_replaces_a_checkpoint_and_nothing_else(model, checkpoint, tmp_path):
    (checkpoint / "trainer_state").mkdir()
    model.save_pretrained(checkpoint)
    assert (checkpoint / "trainer_state").is_dir(), "saving to its own directory changes nothing"
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("all of it")
    with pytest.raises(InputError, match="holds something that is not a checkpoint"):
        model.save_pretrained(tmp_path / "thesis")
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["thesis.tex"]
    model.save_pretrained(tmp_path / "copy")
    (tmp_path / "copy" / "README.md").write_text("of an older one")
    model.save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy" / "README.md").exists()


def test_a_checkpoint_tells_what_it_is_for_without_an_llm(checkpoint, llm_dir, tmp_path):
    (checkpoint / "README.md").write_text("its card")
    loaded = HypernetworkCheckpoint.from_pretrained(checkpoint)
    assert loaded.base_model == str(llm_dir)
    assert loaded.config.hidden_size == 32
    loaded.save_pretrained(tmp_path / "copy")
    assert (tmp_path / "copy" / "README.md").read_text() == "its card"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "oracle"}, "mode=oracle: not one of closed_book, rag, genpoe, genpoe_rag"),
        ({"passages": PASSAGES[:1]}, "2 questions, but passages for 1"),
        ({"passages": ["a", "b"]}, "passages must be one list per question"),
        ({"passages": PASSAGES, "gates": [[1.0], [1.0]]}, "the gates do not match the passages"),
        ({"passages": PASSAGES, "gates": [[1.0, -1.0], [1.0]]}, "a gate is negative"),
        ({"passages": PASSAGES, "gates": [[1.0, float("nan")], [1.0]]}, "a gate is negative or not a finite number"),
        ({"passages": [["a"], ["b", " "]]}, "question 1: a passage is empty or not a string"),
        ({"passages": PASSAGES, "num_return_sequences": 2}, "num_return_sequences=2: there is one text per question"),
        ({"passages": PASSAGES, "batch_size": 0}, "batch_size=0: give a whole number of at least 1"),
    ],
)
def test_bad_input_is_one_line(model, arguments, message):
    with pytest.raises(InputError, match=message):
        model.generate(QUESTIONS, **arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model.generate("who"), "questions must be a list"),
        (lambda model: model.score(QUESTIONS, ["Pesaro"]), "2 questions, but 1 answers"),
        (lambda model: model.score(QUESTIONS, ["Pesaro", " "]), "answer 1 is empty"),
        (
            lambda model: model.experts(PASSAGES, GATES, [0]).__enter__(),
            "passages for 2 rows, but start positions for 1",
        ),
        (lambda model: model.experts(["a", "b"]).__enter__(), "passages must be one list per question"),
    ],
)
def test_other_bad_input_is_one_line_too(model, call, message):
    with pytest.raises(InputError, match=message) as error:
        call(model)
    assert "\n" not in str(error.value)


def test_importing_the_package_imports_nothing_heavy():
    heavy = ("torch", "transformers", "numpy", "huggingface_hub", "lm_eval", "click")
    code = f"import sys, genpoe_plugin; print([name for name in {heavy} if name in sys.modules])"
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert all(getattr(genpoe_plugin, name) is not None for name in genpoe_plugin.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = genpoe_plugin.Nothing


README, GETTING_STARTED = "README.md", "docs/getting-started.md"


def test_the_readmes_example_runs(llm_dir, checkpoint, tmp_path, monkeypatch, capsys):
    texts = [(Path(__file__).parents[1] / name).read_text(encoding="utf-8") for name in (README, GETTING_STARTED)]
    pattern = re.compile(r"```python\n(from genpoe_plugin import GenPoEModel\n.*?)```", re.DOTALL)
    (short,), (example,) = map(pattern.findall, texts)
    assert example.startswith(short)
    example = example.replace("Qwen/Qwen2.5-0.5B-Instruct", str(llm_dir)).replace('"my-experts"', repr(str(checkpoint)))
    monkeypatch.chdir(tmp_path)
    exec(compile(example, GETTING_STARTED, "exec"), {"__name__": "__main__"})
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
    hostile = CliRunner().invoke(main, [*map(str, words[:-1]), "\x1b[2Jclears", "--max-new-tokens", "1"])
    assert hostile.exit_code == 0 and "\x1b" not in hostile.output
    missing = CliRunner().invoke(main, [*map(str, words[:4]), "--hypernetwork", "no/such", "--passage", "a"])
    assert missing.exit_code == 2 and "neither a directory nor a reachable hub repository" in missing.stderr


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_routers_mass_is_that_of_a_softmax_written_out(llm_dir, tmp_path, implementation):
    """The softmax of the prompt's last token over the context and all units, computed for each head and layer."""
    llm = AutoModelForCausalLM.from_pretrained(llm_dir, attn_implementation=implementation).double()
    tokenizer = AutoTokenizer.from_pretrained(llm_dir)
    save_hypernetwork(tmp_path / "experts", Hypernetwork(attention_config(llm, (0, 2))), llm, tokenizer, {})
    model = GenPoEModel(llm, tokenizer, tmp_path / "experts")
    (shares,) = model.router_mass(QUESTIONS[:1], PASSAGES[:1], GATES[:1])
    rows = model._store.rows(PASSAGES[:1], GATES[:1], [0])
    units, calls = model._store.units(PASSAGES[0]), {}

    def record(call):
        calls[call.layer] = call
        active = torch.ones(1, call.query.shape[2], dtype=torch.bool)
        return attend(call, rows.experts.layer(call.layer, rows.gates), active), None

    with intercept_attention(llm, (0, 2), record), torch.no_grad():
        llm(torch.tensor([tokenizer(closed_book_prompt(QUESTIONS[0]))["input_ids"]]))
    expected = torch.zeros(len(units), dtype=torch.float64)
    for number, layer in enumerate((0, 2)):
        call, keys = calls[layer], rows.experts.parts[2 * number][0]
        heads, group = call.query.shape[1], call.query.shape[1] // call.key.shape[1]
        for head in range(heads):
            query = call.query[0, head, -1]
            logits = [float(query @ key[head // group]) * call.scaling for key in keys]
            gates = [gate for gate, count in zip(GATES[0], units, strict=True) for _ in range(count)]
            masses = [g / max(GATES[0]) * math.exp(logit) for g, logit in zip(gates, logits, strict=True)]
            context = sum(math.exp(float(query @ key) * call.scaling) for key in call.key[0, head // group])
            total = sum(masses) + context
            begin = 0
            for number_of_passage, count in enumerate(units):
                expected[number_of_passage] += sum(masses[begin : begin + count]) / total / heads / 2
                begin += count
    assert shares == pytest.approx(expected.tolist(), abs=1e-6)
    assert 0 < sum(shares) < 1


def test_only_experts_in_the_attention_have_a_router(model):
    if model.has_router:
        with pytest.raises(InputError, match="question 1 has no passage"):
            model.router_mass(QUESTIONS, [PASSAGES[0], []])
    else:
        with pytest.raises(InputError, match="only experts in the attention have a router"):
            model.router_mass(QUESTIONS, PASSAGES)
