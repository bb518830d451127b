"""The page on vLLM: its example runs, its arguments exist, and its sizes are right."""

from __future__ import annotations

import re
import shlex
from dataclasses import fields

import torch
from vllm.engine.arg_utils import EngineArgs

from genpoe_plugin.experts.config import HypernetworkConfig
from genpoe_plugin.experts.injection import inject
from genpoe_plugin.experts.store import ExpertStore
from genpoe_plugin.lm.argument_names import accepted_names
from genpoe_plugin.lm.vllm import VLLM, GenPoEVLLM
from genpoe_plugin.vllm_engine.engine_arguments import slot_bytes
from genpoe_plugin.vllm_engine.expert_sets import carriers
from tests.lm.vllm.conftest import SMALL
from tests.test_readme import ALL, DOCS, commands

PAGE = DOCS["vllm.md"]


def test_the_example_runs(llm, llm_dir, hypernetwork_dir, by_hand, tokenizer, capsys):
    examples = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    (example,) = [code for code in examples if "vllm" in code]
    assert len([line for line in example.splitlines() if line.strip()]) <= 11
    options = {**SMALL, "max_model_len": 256}
    here = example.replace("meta-llama/Llama-3.1-8B", str(llm_dir)).replace("my-hypernetwork", str(hypernetwork_dir))
    here = here.replace("max_model_len=2048", "**options")
    assert here.count(str(llm_dir)) == here.count("**options") == 1
    exec(compile(here, "vllm.md", "exec"), {"__name__": "__main__", "options": options})
    printed = capsys.readouterr().out.rstrip("\n").rpartition("\n")[2]  # the engine may log before it answers
    prompt, passages, gates = (eval(re.search(pattern, example)[1]) for pattern in (
        r'request\((".*?"), passages', r"passages = (\[.*\])", r"gates=(\[.*?\])",
    ))  # fmt: skip
    rows = ExpertStore(by_hand.network, llm, tokenizer).rows([passages], [gates], [0])
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    with inject(llm, 1, rows), torch.no_grad():
        new = llm.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :]
    expected = tokenizer.decode(new, skip_special_tokens=True).partition("\n")[0]
    assert printed.strip("\ufffd\n ") == expected.strip("\ufffd\n ") != ""


def test_model_arguments_exist():
    found = [command for command in commands(ALL, "lm_eval") if "genpoe-vllm" in command and "--model_args" in command]
    assert len(found) == 3
    known = {field.name for field in fields(EngineArgs)}
    known |= accepted_names(GenPoEVLLM, VLLM)
    for command in found:
        words = shlex.split(command)
        given = words[words.index("--model_args") + 1]
        assert {pair.partition("=")[0] for pair in given.split(",")} <= known
    assert {*re.findall(r"`([a-z_]+)(?:=[^`]*)?`", PAGE)} <= known | {"lm_eval", "rank", "core_size"}


def test_sizes_of_expert_sets():
    for preset, width, rank, told in (("memory", 4096, 64, "80 KiB"), ("paper", 4096, 512, "64 MiB")):
        config = HypernetworkConfig.preset(preset, hidden_size=width, layer=1)
        number, unit = told.split()
        size = slot_bytes(carriers(config, 4), rank, itemsize=2) / {"KiB": 2**10, "MiB": 2**20}[unit]
        assert abs(size - float(number)) < 1 and told in PAGE
