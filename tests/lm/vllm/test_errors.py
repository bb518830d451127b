"""Invalid arguments are reported in one line, before an engine starts."""

from __future__ import annotations

import subprocess
import sys

import pytest
from vllm import LLM
from vllm.platforms import current_platform

from genpoe_plugin.errors import InputError


@pytest.fixture(autouse=True)
def no_engine(monkeypatch):
    def start(*args, **kwargs):
        raise AssertionError("an engine was started")

    monkeypatch.setattr(LLM, "__init__", start)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "magic"}, "mode=magic: not one of"),
        ({"hypernetwork": None}, "genpoe train hypernetwork"),
        ({"hypernetwork": "/no/such/checkpoint"}, "/no/such/checkpoint"),
        ({"pretrained": "/no/such/llm"}, "LLM /no/such/llm: cannot be loaded"),
        ({"data_parallel_size": 2}, "data_parallel_size=2: experts work with a single engine"),
        ({"lora_local_path": "/lora"}, "lora_local_path=/lora: experts use vLLM's LoRA adapters"),
        ({"lora_target_modules": ["q_proj"]}, "lora_target_modules="),
        ({"max_lora_rank": 1}, "has core_size 6, and max_lora_rank=1; train one with a smaller core_size"),
        ({"max_cpu_loras": 2}, "max_cpu_loras=2 is less than max_loras=4"),
        ({"hf_overrides": len}, "hf_overrides must be a dictionary"),
    ],
)
def test_arguments(make_vllm, arguments, message):
    with pytest.raises(InputError) as error:
        make_vllm(**arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_experts_of_tokens_beside_an_mlp(make_vllm, llm, tokenizer, tmp_path):
    from dataclasses import replace

    from genpoe_plugin.checkpoints.checkpoint import save_hypernetwork
    from genpoe_plugin.experts.hypernetwork import Hypernetwork
    from genpoe_plugin.training.creation import attention_config

    config = replace(attention_config(llm, (1, 2)), place="mlp")
    save_hypernetwork(tmp_path / "beside", Hypernetwork(config), llm, tokenizer, {})
    with pytest.raises(InputError, match="which do not run on vLLM; use --model genpoe") as error:
        make_vllm(hypernetwork=str(tmp_path / "beside"))
    assert str(tmp_path / "beside") in str(error.value) and "\n" not in str(error.value)


def test_an_architecture_without_a_class(make_vllm, make_llm, tokenizer, make_hypernetwork_dir, tmp_path):
    make_llm("gpt_neox", hidden_size=64).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    from transformers import AutoModelForCausalLM

    from genpoe_plugin.checkpoints.checkpoint import save_hypernetwork
    from genpoe_plugin.experts.config import HypernetworkConfig
    from genpoe_plugin.experts.hypernetwork import Hypernetwork

    config = HypernetworkConfig(hidden_size=64, layers=(1,), expert_width=16, core_size=6, head="factored")
    llm = AutoModelForCausalLM.from_pretrained(tmp_path)
    save_hypernetwork(tmp_path / "hypernetwork", Hypernetwork(config), llm, tokenizer, {})
    with pytest.raises(InputError, match="is a GPTNeoXForCausalLM; on vLLM, experts support Llama, Qwen2"):
        make_vllm(pretrained=str(tmp_path), hypernetwork=str(tmp_path / "hypernetwork"))


@pytest.mark.parametrize("form", [{"head": "dense", "rank": 513}, {"head": "factored", "core_size": 600}])
def test_a_rank_beyond_the_engines(make_vllm, make_hypernetwork_dir, form):
    directory = make_hypernetwork_dir(hidden_size=64, **form)
    with pytest.raises(InputError, match=r"has (rank 513|core_size 600), and vLLM's largest LoRA rank is 512"):
        make_vllm(hypernetwork=str(directory))


def test_a_checkpoint_of_another_llm(make_vllm, make_llm, tokenizer, tmp_path):
    """An LLM that differs only above the layers that are read is another LLM as well."""
    for different in ({"seed": 9}, {"num_hidden_layers": 5}):
        sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
        make_llm("llama", **sizes, **different).save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        with pytest.raises(InputError, match="was trained for"):
            make_vllm(pretrained=str(tmp_path))


def test_sets_that_do_not_fit(make_vllm, monkeypatch):
    arguments = {}

    def started(self, model=None, **engine_arguments):
        arguments.update(engine_arguments)
        raise StopIteration

    monkeypatch.setattr(LLM, "__init__", started)
    free = {"max_loras": None, "max_cpu_loras": None}
    # A set of four experts with cores of 6: 1 + 3, 6 + 24, and 24 + 6 numbers wide, each padded to a rank of 8.
    size = (4 + 30 + 30) * 8 * 4
    with pytest.raises(StopIteration):
        make_vllm(**free)
    assert (arguments["max_loras"], arguments["max_cpu_loras"]) == (16, 32)
    monkeypatch.setattr(type(current_platform), "get_device_total_memory", lambda *_: 10 * 5 * size + 5)
    with pytest.raises(StopIteration):
        make_vllm(**free)
    assert (arguments["max_loras"], arguments["max_cpu_loras"]) == (5, 10)
    arguments.clear()
    monkeypatch.setattr(type(current_platform), "get_device_total_memory", lambda *_: 5 * size)
    with pytest.raises(InputError, match=r"one expert set takes .* MiB, more than 10% of the device's memory"):
        make_vllm(**free)
    assert not arguments


def test_another_version_of_vllm(llm_dir):
    """The version is checked when lm-eval imports the model class."""
    program = (
        "import importlib.metadata as m; known = m.version\n"
        "m.version = lambda name: '0.11.0' if name == 'vllm' else known(name)\n"
        "from genpoe_plugin.errors import InputError\n"
        "try:\n    import genpoe_plugin.lm.vllm\n"
        "except InputError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("vllm 0.11.0: experts need a vLLM from 0.32")
