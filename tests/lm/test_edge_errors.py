"""Errors of the stock lm_eval command are one line, with an exit status other than 0."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from lm_eval.tasks import TaskManager

from genpoe_plugin.errors import InputError
from genpoe_plugin.lm.hf import GenPoELM
from genpoe_plugin.registration import task_folder

ROOT = Path(__file__).parents[2]
VLLM = find_spec("vllm") is not None

BY_THE_START_UP_FILE = "import genpoe_plugin.registration as r; r.install()"
BY_LM_EVAL_ITSELF = (
    "from lm_eval.api.registry import model_registry as m; m.register('genpoe', target='genpoe_plugin.lm.hf:GenPoELM')"
)
# Otherwise the command would spend most of its time on reading thousands of other task files.
OWN_TASKS_ALONE = (
    "from lm_eval.tasks._index import TaskIndex; from genpoe_plugin.registration import task_folder; "
    "build = TaskIndex.build; TaskIndex.build = staticmethod(lambda _, **options: build([task_folder()], **options))"
)


@pytest.mark.parametrize(
    ("model", "setup", "message"),
    [
        ("genpoe", BY_THE_START_UP_FILE, "mode=rags: not one of closed_book, rag, genpoe, genpoe_rag"),
        ("genpoe", BY_LM_EVAL_ITSELF, "mode=rags: not one of closed_book, rag, genpoe, genpoe_rag"),
        # The first error depends on whether vLLM is installed.
        ("genpoe-vllm", BY_THE_START_UP_FILE, "mode=rags: not one of" if VLLM else "genpoe-vllm needs vLLM"),
    ],
)
def test_the_stock_command_ends_in_one_line(llm_dir, model, setup, message):
    words = f"--model {model} --model_args pretrained={llm_dir},mode=rags --tasks genpoe_nq --device cpu".split()
    code = f"import sys, runpy; sys.argv[0] = 'lm_eval'; {setup}; {OWN_TASKS_ALONE}; "
    code += "runpy.run_module('lm_eval', run_name='__main__', alter_sys=True)"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "GENPOE_NO_AUTOLOAD": str(int(setup == BY_LM_EVAL_ITSELF))}
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith(f"error: {message}")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("program", "raised", "output"),
    [
        ("lm_eval", "InputError('one\\ntwo')", "error: one\\ntwo\n"),
        ("lm_eval", "ValueError('one')", None),
        ("mine", "InputError('one')", None),
    ],
)
def test_other_errors_and_programs_keep_their_tracebacks(program, raised, output):
    code = (
        f"import sys; sys.argv[0] = {program!r}; from genpoe_plugin.errors import InputError; "
        f"from genpoe_plugin.registration import errors_in_one_line; errors_in_one_line(); raise {raised}"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == output or (output is None and done.stderr.startswith("Traceback"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("num_passage=2", r"num_passage: no such model argument; did you mean num_passages\?"),
        ("batch_size=4", "batch_size=4 among the model arguments: lm_eval has the option --batch_size"),
    ],
)
def test_a_name_that_is_none_is_answered_before_anything_is_loaded(arguments, message):
    with pytest.raises(InputError, match=message):
        GenPoELM.create_from_arg_string(f"pretrained=nothing,mode=closed_book,{arguments}", {"batch_size": 1})


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_an_llm_that_cannot_be_loaded_is_one_line(llm_dir, tmp_path, missing):
    with pytest.raises(InputError, match=r"^LLM no/such: cannot be loaded \(.*\); give a directory or a hub name$"):
        GenPoELM("no/such", mode="closed_book", device="cpu")
    shutil.copytree(llm_dir, tmp_path / "llm", ignore=shutil.ignore_patterns(missing, "tokenizer_config.json"))
    with pytest.raises(InputError, match=r"^LLM .*llm: cannot be loaded \(.*\)$"):
        GenPoELM(str(tmp_path / "llm"), mode="closed_book", device="cpu")


def test_lm_eval_hands_on_what_is_wrong_with_a_file(tmp_path):
    data = {"genpoe_data": str(tmp_path / "nothing.jsonl")}
    manager = TaskManager(include_path=str(task_folder()), include_defaults=False, metadata=data)
    with pytest.raises(InputError, match=r"nothing\.jsonl: no such file"):
        manager.load(["genpoe_nq"])


@pytest.mark.parametrize("arguments", ["mode=closed_book", "mode=closed_book,model=llm", ""])
def test_an_llm_that_is_not_named_is_asked_for(arguments):
    with pytest.raises(InputError, match="the model arguments name no LLM; add pretrained="):
        GenPoELM.create_from_arg_string(arguments)


def test_a_device_is_named_once(llm_dir):
    with pytest.raises(InputError, match="device=cpu among the model arguments: lm_eval has the option --device"):
        GenPoELM.create_from_arg_string(f"pretrained={llm_dir},mode=closed_book,device=cpu", {"device": "cpu"})
    lm = GenPoELM.create_from_arg_string(f"pretrained={llm_dir},mode=closed_book,device=cpu", {"device": None})
    assert lm.device.type == "cpu"


def test_what_nothing_takes_is_named_and_what_the_loader_takes_is_not(llm_dir):
    base = {"pretrained": str(llm_dir), "mode": "closed_book", "device": "cpu"}
    with pytest.raises(InputError, match="flavour=sweet: not an argument of this model or of the LLM"):
        GenPoELM.create_from_arg_obj({**base, "flavour": "sweet"})
    with pytest.raises(InputError, match=r"max_lenght=64: not an argument .*; did you mean max_length\?$"):
        GenPoELM.create_from_arg_obj({**base, "max_lenght": 64})
    # The loader's argument max_memory is similar to max_cpu_memory, an argument of lm-eval's class.
    lm = GenPoELM.create_from_arg_obj({**base, "attn_implementation": "eager", "max_memory": {"cpu": "1GB"}})
    assert lm.model.config._attn_implementation == "eager"


def test_passages_of_a_question_need_no_ids(tmp_path):
    from genpoe_plugin.data.questions import read_questions

    path = tmp_path / "questions.jsonl"
    ctxs = [{"title": "A", "text": "one"}, {"title": "A", "text": "two"}, {"id": None, "title": "A", "text": "one"}]
    path.write_text(json.dumps({"question": "what", "answers": ["one"], "ctxs": ctxs}) + "\n")
    (question,) = read_questions(path)
    first, second, again = (entry.passage for entry in question.passages)
    assert first == again and first.id != second.id and first.string == "A: one"
