"""What a user of the stock lm_eval sees where something is wrong: one line, and a status that is not 0."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from genpoe_plugin.errors import InputError
from genpoe_plugin.lm import GenPoELM

ROOT = Path(__file__).parents[2]


def lm_eval(*words: object, model: str = "genpoe") -> subprocess.CompletedProcess[str]:
    """The stock command in a process of its own, with what the package's start-up file does."""
    code = (
        "import sys, runpy; import genpoe_plugin.registration as r; r.install(); "
        "sys.argv[0] = 'lm_eval'; runpy.run_module('lm_eval', run_name='__main__', alter_sys=True)"
    )
    command = [sys.executable, "-c", code, "--model", model, *map(str, words)]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("mode=rags", "mode=rags: not one of closed_book, rag, genpoe, genpoe_rag"),
        ("mode=closed_book,num_passage=2", "num_passage: no such model argument; did you mean num_passages?"),
        (
            "mode=closed_book,batch_size=4",
            "batch_size=4 among the model arguments: lm_eval has the option --batch_size",
        ),
    ],
)
def test_the_stock_command_ends_in_one_line(llm_dir, arguments, message):
    done = lm_eval("--model_args", f"pretrained={llm_dir},{arguments}", "--tasks", "genpoe_nq", "--device", "cpu")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"error: {message}") and "Traceback" not in done.stderr


def test_the_class_for_vllm_ends_in_one_line_too(llm_dir):
    """What is wrong first depends on whether vLLM is there."""
    arguments = f"pretrained={llm_dir},mode=rags"
    done = lm_eval("--model_args", arguments, "--tasks", "genpoe_nq", model="genpoe-vllm")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    wrong = "mode=rags: not one of" if find_spec("vllm") else "genpoe-vllm needs vLLM"
    assert last.startswith(f"error: {wrong}") and "Traceback" not in done.stderr


def test_other_errors_keep_their_tracebacks(llm_dir):
    done = lm_eval("--model_args", f"pretrained={llm_dir}", "--tasks", "genpoe_nq", model="no_such_model")
    assert done.returncode == 1 and "Traceback" in done.stderr


def test_a_device_is_named_once(llm_dir):
    with pytest.raises(InputError, match="device=cpu among the model arguments: lm_eval has the option --device"):
        GenPoELM.create_from_arg_string(f"pretrained={llm_dir},mode=closed_book,device=cpu", {"device": "cpu"})
    lm = GenPoELM.create_from_arg_string(f"pretrained={llm_dir},mode=closed_book,device=cpu", {"device": None})
    assert lm.device.type == "cpu"


def test_what_nothing_takes_is_named_and_what_the_loader_takes_is_not(llm_dir):
    base = {"pretrained": str(llm_dir), "mode": "closed_book", "device": "cpu"}
    with pytest.raises(InputError, match="flavour=sweet: no model argument, and nothing that the LLM takes"):
        GenPoELM.create_from_arg_obj({**base, "flavour": "sweet"})
    with pytest.raises(InputError, match=r"max_lenght=64: no model argument, .*; did you mean max_length\?$"):
        GenPoELM.create_from_arg_obj({**base, "max_lenght": 64})
    # Of the loader's names max_memory is much like max_cpu_memory, which lm-eval's class has.
    lm = GenPoELM.create_from_arg_obj({**base, "attn_implementation": "eager", "max_memory": {"cpu": "1GB"}})
    assert lm.model.config._attn_implementation == "eager"


def test_passages_of_a_question_need_no_ids(tmp_path):
    from genpoe_plugin.questions import read_questions

    path = tmp_path / "questions.jsonl"
    ctxs = [{"title": "A", "text": "one"}, {"title": "A", "text": "two"}, {"title": "A", "text": "one"}]
    path.write_text(json.dumps({"question": "what", "answers": ["one"], "ctxs": ctxs}) + "\n")
    (question,) = read_questions(path)
    first, second, again = (entry.passage for entry in question.passages)
    assert first == again and first.id != second.id and first.string == "A: one"
