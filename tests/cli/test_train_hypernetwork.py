"""``genpoe train hypernetwork`` through the command line."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from genpoe_plugin import device_memory
from genpoe_plugin.checkpoints.checkpoint import load_hypernetwork, read_record
from genpoe_plugin.data.questions import read_questions
from genpoe_plugin.experts.config import HypernetworkConfig
from genpoe_plugin.training.examples import training_examples
from genpoe_plugin.training.hypernetwork import train_hypernetwork
from genpoe_plugin.training.memory import NoEstimate
from genpoe_plugin.training.training_arguments import HypernetworkTraining
from genpoe_plugin.training.trials import HypernetworkTrial
from tests.gguf_llm import write_gguf
from train_cli.main import main
from train_cli.train_hypernetwork import hypernetwork as command

FACTS = [
    ("who wrote the opera", "Gioachino Rossini", "Rossini: the opera is by Gioachino Rossini."),
    ("where is it", "Canberra", "The capital is Canberra."),
    ("what did she discover", "radium", "Marie Curie discovered radium."),
]


def line(question: str, answer: str, text: str) -> str:
    return json.dumps({"question": question, "answers": [answer], "ctxs": [{"id": "1", "title": "T", "text": text}]})


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(f"{line(*fact)}\n" for fact in FACTS))
    return path


def run(model: Path, data: Path, out: Path, *options: object) -> Result:
    """Experts beside an MLP."""
    preset = [] if "--preset" in options else ["--preset", "memory"]
    arguments = ["--model", model, "--data", data, "--out", out, *preset, "--rank", 4, *options]
    return CliRunner().invoke(main, ["train", "hypernetwork", *map(str, arguments)])


def assert_one_line(result: Result, message: str) -> None:
    """After whatever progress bars there were."""
    assert result.exit_code == 2, result.exception
    last = result.stderr.splitlines()[-1]
    assert last.lower().startswith("error: ") and message in last
    assert result.stderr.lower().count("error: ") == 1 and "Traceback" not in result.stderr


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_defaults_follow_the_llm(family, make_llm, tokenizer, data: Path, tmp_path: Path) -> None:
    """Research code: dimensions and four model names written down. This LLM has other ones than all tests beside."""
    make_llm(family, hidden_size=48, num_hidden_layers=6).save_pretrained(tmp_path / "llm")
    tokenizer.save_pretrained(tmp_path / "llm")
    result = run(tmp_path / "llm", data, tmp_path / "out", "--max-steps", 1)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"{tmp_path / 'out'}: trained in 1 steps, loss ")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "llm")
    trained = load_hypernetwork(tmp_path / "out", model, tokenizer)
    assert trained.config == HypernetworkConfig.preset("memory", hidden_size=48, layer=2, rank=4)
    assert trained.head.get_parameter("write_up").shape == (48, 64)


def test_options_reach_the_core(llm_dir: Path, data: Path, tmp_path: Path) -> None:
    """The command's checkpoint is, number for number, that of the same training called by hand."""
    form = {"layer": 0, "expert_width": 5, "encoder": "attention", "num_queries": 2, "code_size": 7, "base": "silent"}
    settings = {
        "max_steps": 4,
        "batch_size": 2,
        "micro_batch_size": 1,
        "learning_rate": 0.01,
        "warmup_ratio": 0.3,
        "final_rate": 0.5,
        "weight_decay": 0.2,
        "max_gradient_norm": 0.1,
        "seed": 3,
        "num_passages": 2,
        "knowledge": 0.5,
        "distillation": 0.5,
    }
    options = [part for name, value in (form | settings).items() for part in (f"--{name.replace('_', '-')}", value)]
    options += ["--preset", "paper", "--normalise", "--generator-gain", 0.5]
    result = run(llm_dir, data, tmp_path / "out", *options)
    assert result.exit_code == 0, result.output

    model, tokenizer = AutoModelForCausalLM.from_pretrained(llm_dir), AutoTokenizer.from_pretrained(llm_dir)
    config = HypernetworkConfig.preset("paper", hidden_size=32, rank=4, normalise=True, generator_gain=0.5, **form)
    training = HypernetworkTraining(**settings)
    examples = training_examples(read_questions(data), titles=False)
    train_hypernetwork(config, training, examples, model, tokenizer, tmp_path / "by_hand")
    trained, by_hand = (load_hypernetwork(tmp_path / name, model, tokenizer) for name in ("out", "by_hand"))
    assert trained.config == config
    assert all(torch.equal(tensor, by_hand.state_dict()[name]) for name, tensor in trained.state_dict().items())
    record = read_record(tmp_path / "out")["training"]
    assert {name: record["arguments"][name] for name in settings} == settings
    assert record["steps"] == len((tmp_path / "out" / "loss.csv").read_text().splitlines()) - 1 == 4


def test_an_llm_in_a_gguf_file(llm_dir: Path, make_llm, tokenizer, data: Path, tmp_path: Path) -> None:
    """The same numbers as from the directory that the file was; the file is named where the LLM is."""
    write_gguf(tmp_path / "tiny.gguf", make_llm("llama"), tokenizer)
    result = run(tmp_path, data, tmp_path / "out", "--max-steps", 2, "--gguf-file", "tiny.gguf")
    assert result.exit_code == 0, result.output
    assert run(llm_dir, data, tmp_path / "expected", "--max-steps", 2).exit_code == 0
    trained, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "expected"))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in trained.items())
    assert '"gguf_file": "tiny.gguf"' in (tmp_path / "out" / "README.md").read_text()
    assert json.loads((tmp_path / "out" / "training.json").read_text())["arguments"]["gguf_file"] == "tiny.gguf"
    missing = run(tmp_path, data, tmp_path / "other", "--gguf-file", "other.gguf")
    assert_one_line(missing, f"{tmp_path / 'other.gguf'}: no such file")


def test_experts_in_the_attention_are_trained_from_a_preset_or_a_checkpoint(llm_dir, data, tmp_path: Path) -> None:
    """The same form either way; from the checkpoint with its weights."""
    untrained = ["experts", "create", "--llm", llm_dir, "--layers", "0,2", "--out", tmp_path / "untrained"]
    assert CliRunner().invoke(main, list(map(str, untrained))).exit_code == 0
    options = ["--addition-rank", 3, "--window", 2, "--max-steps", 2, "--learning-rate", 0.01]
    arguments = ["--model", llm_dir, "--data", data, *options]
    ways = {"preset": ["--preset", "recommended", "--layers", "0,2"], "init": ["--init", tmp_path / "untrained"]}
    forms = []
    for name, way in ways.items():
        words = ["train", "hypernetwork", *arguments, *way, "--out", tmp_path / name]
        result = CliRunner().invoke(main, list(map(str, words)))
        assert result.exit_code == 0, result.output
        forms.append(read_record(tmp_path / name)["hypernetwork"])
    assert forms[0] == forms[1]
    assert (forms[0]["layers"], forms[0]["addition_rank"], forms[0]["window"]) == ([0, 2], 3, 2)
    assert (forms[0]["query_rank"], forms[0]["layout"]) == (64, "paragraph")
    weights = load_file(tmp_path / "preset" / "model.safetensors")
    more = [
        "--model",
        llm_dir,
        "--data",
        data,
        "--init",
        tmp_path / "preset",
        "--max-steps",
        1,
        "--learning-rate",
        1e-9,
    ]
    result = CliRunner().invoke(main, list(map(str, ["train", "hypernetwork", *more, "--out", tmp_path / "more"])))
    assert result.exit_code == 0, result.output
    forms = [load_file(tmp_path / name / "model.safetensors") for name in ways]
    torch.testing.assert_close(forms[0], forms[1], atol=1e-6, rtol=1e-6)  # the same beginning, and so the same end
    for name, weight in load_file(tmp_path / "more" / "model.safetensors").items():
        torch.testing.assert_close(weight, weights[name], atol=1e-6, rtol=1e-6)
    assert weights["head.adders.0.write"].abs().max() > 0


def test_the_same_experts_are_trained_beside_an_mlp(llm_dir, data, tmp_path: Path) -> None:
    words = ["train", "hypernetwork", "--model", llm_dir, "--data", data, "--preset", "attention", "--layers", "1,2"]
    words += ["--place", "mlp", "--max-steps", 2, "--learning-rate", 0.01]
    result = CliRunner().invoke(main, list(map(str, [*words, "--out", tmp_path / "out"])))
    assert result.exit_code == 0, result.output
    assert read_record(tmp_path / "out")["hypernetwork"]["place"] == "mlp"
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert weights["head.adders.0.write"].abs().max() > 0
    assert weights["head.bias"].abs().max() > 0


def test_passages_alone_are_learned_from(llm_dir, tmp_path: Path) -> None:
    passages = tmp_path / "passages.jsonl"
    passages.write_text(
        json.dumps({"id": "1", "title": "Fox", "text": "the quick brown fox jumps over it " * 6}) + "\n"
    )
    arguments = ["--model", llm_dir, "--preset", "attention", "--max-steps", 1, "--out", tmp_path / "out"]
    words = ["train", "hypernetwork", *arguments, "--pretrain", passages]
    result = CliRunner().invoke(main, list(map(str, words)))
    assert result.exit_code == 0, result.output
    record = read_record(tmp_path / "out")
    assert record["hypernetwork"]["layers"] == [0, 1, 2]
    assert record["training"]["arguments"]["learning_rate"] == 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give either --data QUESTIONS or --pretrain PASSAGES"),
        (["--data", "x", "--pretrain", "y"], "give either --data"),
        (["--pretrain", "{empty}"], "every passage is too short; 30 words are needed"),
        (
            ["--data", "{data}", "--preset", "memory", "--layers", "0,1"],
            "--layers: --preset memory has experts in one layer, give --layer; or give --preset recommended or",
        ),
        (["--data", "{data}", "--layer", "1"], "--layer: give --layers with --preset recommended"),
        (["--data", "{data}", "--rank", "8"], "--rank is for experts beside an MLP; give --preset paper or memory"),
        (["--data", "{data}", "--init", "{missing}"], "neither a directory nor a reachable hub repository"),
        (["--data", "{data}", "--init", "x", "--layer", "1"], "--layer: --init x decides the form"),
        (["--data", "{data}", "--preset", "attention", "--layers", "7"], "layer 7 is not in"),
        (["--data", "{data}", "--preset", "attention", "--window", "0"], "window is 0"),
        (["--data", "{data}", "--preset", "memory", "--window", "2"], "window is for head 'attention'"),
        (["--data", "{data}", "--preset", "attention", "--layer", "1"], "--layer: give --layers"),
        (["--data", "{data}", "--preset", "attention", "--place", "mlp"], "no MLP is below layer 0"),
        (["--data", "{data}", "--preset", "memory", "--place", "mlp"], "place is for head 'attention'"),
        (["--data", "{data}", "--head", "attention"], "--head attention: give --preset recommended"),
        (["--pretrain", "{data}", "--unanswerable", "0.5"], "--unanswerable and --num-passages need questions"),
    ],
)
def test_what_experts_in_the_attention_cannot_be(llm_dir, data, tmp_path: Path, options, message) -> None:
    (tmp_path / "empty.jsonl").write_text('{"id": "1", "title": "", "text": "short"}\n')
    names = {"data": data, "empty": tmp_path / "empty.jsonl", "missing": tmp_path / "missing"}
    filled = [option.format(**names) for option in options]
    words = ["train", "hypernetwork", "--model", str(llm_dir), "--out", str(tmp_path / "out"), *filled]
    result = CliRunner().invoke(main, words)
    assert_one_line(result, message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("options", "titles"), [([], True), (["--preset", "paper"], False), (["--no-titles"], False)])
def test_the_paper_trains_without_titles(llm_dir: Path, data: Path, tmp_path: Path, options: list[str], titles) -> None:
    assert run(llm_dir, data, tmp_path / "out", "--max-steps", 1, *options).exit_code == 0
    record = json.loads((tmp_path / "out" / "training.json").read_text())
    assert record["arguments"]["titles"] is titles
    by_hand = training_examples(read_questions(data), titles)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(llm_dir), AutoTokenizer.from_pretrained(llm_dir)
    config = load_hypernetwork(tmp_path / "out", model, tokenizer).config
    progress = train_hypernetwork(
        config, HypernetworkTraining(max_steps=1), by_hand, model, tokenizer, tmp_path / "two"
    )
    assert progress.losses[0][1] == record["losses"][0][1]


def test_validation_decides_what_is_kept(llm_dir: Path, data: Path, tmp_path: Path) -> None:
    """Measured on the training data, which an expert with so many steps knows by heart."""
    options = ["--validation", data, "--validate-every", 30, "--max-steps", 60, "--learning-rate", 0.01]
    result = run(llm_dir, data, tmp_path / "out", *options, "--batch-size", 3)
    assert result.exit_code == 0, result.output
    (em, f1, loss, _) = result.stdout.splitlines()
    assert loss.startswith("loss: ")
    assert em.startswith("em: 0.000 before training, 1.000 at step ")
    assert f1.startswith("f1: 0.") and ", 1.000 at step " in f1
    validations = json.loads((tmp_path / "out" / "training.json").read_text())["validations"]
    assert [row["step"] for row in validations] == [0, 30, 60]


def test_the_same_command_again_says_that_it_is_done(llm_dir: Path, data: Path, tmp_path: Path) -> None:
    first = run(llm_dir, data, tmp_path / "out", "--max-steps", 2)
    again = run(llm_dir, data, tmp_path / "out", "--max-steps", 2)
    assert again.exit_code == 0
    assert again.stdout == f"{tmp_path / 'out'}: already finished; delete it to train again\n{first.stdout}"
    assert "Training" not in again.stderr


@pytest.mark.parametrize("change", ["option", "data", "model"])
def test_another_training_is_named_and_replaces_nothing(
    make_llm, tokenizer, llm_dir: Path, data: Path, tmp_path: Path, change: str
) -> None:
    assert run(llm_dir, data, tmp_path / "out", "--max-steps", 1).exit_code == 0
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    if change == "data":
        data.write_text(f"{line(*FACTS[0])}\n" * 3)
    model = llm_dir
    if change == "model":
        model = tmp_path / "llm"
        make_llm("llama", seed=9).save_pretrained(model)
        tokenizer.save_pretrained(model)
    options = ["--max-steps", 1, *(["--seed", 5] if change == "option" else [])]
    named = {"option": "seed was 0, is 5", "data": "data was ", "model": f"model was {llm_dir}, is {model}"}[change]
    assert_one_line(run(model, data, tmp_path / "out", *options), f"holds a run with other arguments ({named}")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_an_llm_in_half_precision(llm_dir: Path, data: Path, tmp_path: Path, dtype: str) -> None:
    result = run(llm_dir, data, tmp_path / "out", "--max-steps", 2, "--dtype", dtype)
    assert result.exit_code == 0, result.output
    weights = load_hypernetwork(
        tmp_path / "out", AutoModelForCausalLM.from_pretrained(llm_dir), AutoTokenizer.from_pretrained(llm_dir)
    ).state_dict()
    assert all(torch.isfinite(weight).all() and weight.dtype == torch.float32 for weight in weights.values())


def test_sizes_and_memory_are_told_before_anything_is_loaded(tokenizer, data: Path, tmp_path: Path) -> None:
    """Of an LLM of Llama 2's size, of which there is a configuration and nothing else."""
    LlamaConfig(vocab_size=32000, torch_dtype="float16").save_pretrained(tmp_path / "llm")
    tokenizer.save_pretrained(tmp_path / "llm")
    told = {}
    for preset in ("paper", "memory"):
        result = CliRunner().invoke(
            main,
            [
                *["train", "hypernetwork", "--model", str(tmp_path / "llm"), "--data", str(data)],
                *["--preset", preset, "--out", str(tmp_path / "out"), "--estimate"],
            ],
        )
        assert result.exit_code == 0, result.output
        assert "LLM weights" in result.stderr and "12.6 GiB" in result.stderr
        first = result.stderr.splitlines()[0]
        assert first.startswith("hypernetwork: ")
        told[preset] = [int(word.replace(",", "")) for word in first.split() if word[0].isdigit()]
    parameters, expert = told["paper"]
    # Linear(4096, 128), and Linear(128, 2 * 512 * (4096 + 4096)).
    assert parameters == 4097 * 128 + 129 * 2**23 and expert == 32 * 2**20
    assert told["memory"][0] <= parameters / 100 and told["memory"][1] <= expert / 500
    assert not (tmp_path / "out").exists()


def test_what_cannot_fit_is_refused_with_advice(llm_dir: Path, data: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(device_memory, "available_memory", lambda device: 1_000_000)
    result = run(llm_dir, data, tmp_path / "out", "--preset", "paper", "--batch-size", 64)
    assert_one_line(result, "training needs about ")
    assert "micro_batch_size=" in result.stderr and "Loading" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_an_llm_that_cannot_be_measured_is_trained(llm_dir: Path, data: Path, tmp_path: Path, monkeypatch) -> None:
    def measure(self: object) -> None:
        raise NoEstimate("no memory estimate")

    monkeypatch.setattr(HypernetworkTrial, "measure", measure)
    assert_one_line(run(llm_dir, data, tmp_path / "out", "--estimate"), "no memory estimate")
    result = run(llm_dir, data, tmp_path / "out", "--max-steps", 1)
    assert result.exit_code == 0 and "no memory estimate; training without" in result.stderr


def test_the_card_has_the_command_and_the_scores(llm_dir: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "an out"
    options = ["--max-steps", 2, "--validation", data, "--no-normalise", "--licence", "mit", "--dataset", "org/nq"]
    assert run(llm_dir, data, out, *options).exit_code == 0
    card = (out / "README.md").read_text()
    about = yaml.safe_load(card.split("---\n")[1])
    assert (about["license"], about["datasets"]) == ("mit", ["org/nq"])
    best = json.loads((out / "training.json").read_text())
    measured = next(row for row in best["validations"] if row["step"] == best["best"])
    index = {metric["type"]: metric["value"] for metric in about["model-index"][0]["results"][0]["metrics"]}
    assert index == pytest.approx(
        {"exact_match": measured["em"], "f1": measured["f1"], "loss": measured["loss"]}, abs=1e-4
    )
    assert str(tmp_path) not in card and str(llm_dir) not in card
    command = next(line for line in card.splitlines() if line.startswith("genpoe train"))
    assert shlex.split(command) == [
        *["genpoe", "train", "hypernetwork", "--model", llm_dir.name, "--data", data.name, "--out", out.name],
        *["--validation", data.name, "--preset", "memory", "--rank", "4", "--no-normalise", "--max-steps", "2"],
        *["--dataset", "org/nq", "--licence", "mit"],
    ]
    assert hashlib.sha256(data.read_bytes()).hexdigest() in card
    assert "| first | 0 |" in card and "curves.png" in card and "--model genpoe" in card
    again = run(llm_dir, data, out, *options)
    assert again.exit_code == 0 and "already finished" in again.stdout


def test_options_are_the_settings_with_their_defaults() -> None:
    options = {option.name: option.to_info_dict() for option in command.params}
    for field in dataclasses.fields(HypernetworkTraining):
        assert options[field.name]["default"] == field.default, field.name
    of_the_llm = {"hidden_size", "layers", "num_heads", "num_kv_heads", "head_width", "kv_heads"}
    for name in {"layer"} | {field.name for field in dataclasses.fields(HypernetworkConfig)} - of_the_llm:
        assert options[name]["default"] is None, "the preset's"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "data.jsonl: no such file"),
        ("", "data.jsonl: the file is empty"),
        (line(*FACTS[0]) + "\n{", "data.jsonl:2: not JSON"),
        (line(*FACTS[0]) + '\n\n{"question": "who"}\n', "data.jsonl:3: a question needs a list of answer strings"),
        (line("who", "a", " ") + "\n", "data.jsonl:1, \"ctxs\", item 1: passage '1' has no text"),
        (line("who", "nobody", "says something else") + "\n", "no training example"),
        ('{"question": "who", "answer": ["a"]}\n', "no training example"),
    ],
)
def test_bad_data_is_one_line(llm_dir: Path, data: Path, tmp_path: Path, content: str | None, message: str) -> None:
    data.unlink()
    if content is not None:
        data.write_text(content)
    assert_one_line(run(llm_dir, data, tmp_path / "out"), message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rank", 0], "rank is 0; it must be"),
        (["--rank", -4], "rank is -4; it must be"),
        (["--expert-width", 0], "expert_width is 0; it must be"),
        (["--code-size", 0], "code_size is 0; it must be"),
        (["--num-queries", 0], "num_queries is 0; it must be"),
        (["--layer", 3], "layer 3 is not in LlamaForCausalLM, which has layers 0 to 2"),
        (["--layer", -1], "layers is (-1,); it must be"),
        (["--encoder", "max"], "--encoder"),
        (["--epochs", 0], "epochs is 0; it must be"),
        (["--max-steps", 0], "max_steps is 0; it must be"),
        (["--batch-size", 0], "batch_size is 0; it must be"),
        (["--learning-rate", 0], "learning_rate is 0.0; it must be"),
        (["--knowledge", 1.5], "knowledge is 1.5; it must be from 0 to 1"),
        (["--model", "no/such/llm"], "LLM no/such/llm: cannot be loaded"),
        (["--device", "abacus"], "abacus"),
        (["--dtype", "float3"], "float3"),
    ],
)
def test_bad_options_are_one_line(
    llm_dir: Path, data: Path, tmp_path: Path, options: list[object], message: str
) -> None:
    assert_one_line(run(llm_dir, data, tmp_path / "out", *options), message)
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_no_number_ends_the_training(make_llm, tokenizer, data: Path, tmp_path: Path) -> None:
    """A checkpoint of such numbers would load, and answer nothing."""
    broken = make_llm("llama")
    broken.model.norm.weight.data.fill_(torch.nan)
    broken.save_pretrained(tmp_path / "llm")
    tokenizer.save_pretrained(tmp_path / "llm")
    assert_one_line(run(tmp_path / "llm", data, tmp_path / "out"), "the loss at step 1 is nan")
    assert not (tmp_path / "out").exists()


def test_nothing_else_is_replaced(llm_dir: Path, data: Path, tmp_path: Path) -> None:
    """An LLM's directory has a config.json as well, and one slip of the hand puts it after --out."""
    llm = shutil.copytree(llm_dir, tmp_path / "llm")
    files = sorted(path.name for path in llm.iterdir())
    for out in (llm, data, tmp_path):
        result = run(llm_dir, data, out)
        assert_one_line(result, f"{out}: holds something that is not a training run")
        assert "Training" not in result.stderr, "it is said before the work, not after"
    assert sorted(path.name for path in llm.iterdir()) == files
    assert data.is_file()
