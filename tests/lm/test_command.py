"""The command `lm_eval --model genpoe` with the options that change prompts, batches, answers and what is cached."""

from __future__ import annotations

import json
import shutil
import sys

import jinja2
import pytest
from lm_eval import evaluator
from lm_eval._cli import HarnessCLI
from lm_eval.tasks._index import TaskIndex

from genpoe_plugin import registration
from genpoe_plugin.lm.hf import GenPoELM
from genpoe_plugin.prompts import closed_book_prompt, knowledge_block

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SHOTS = [("What is the capital of portugal?", "Lisbon"), ("Who wrote the novel pride and prejudice?", "Jane Austen")]


@pytest.fixture(scope="module")
def chat_dir(llm_dir, tmp_path_factory):
    """The tiny LLM with a chat template."""
    directory = tmp_path_factory.mktemp("chat") / "llm"
    shutil.copytree(llm_dir, directory)
    config = directory / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": TEMPLATE}))
    return directory


@pytest.fixture
def lm_eval(monkeypatch, tmp_path, docs_file, hypernetwork_dir):
    """``lm_eval(model_args, *options)``: run the command; the samples that it logs, by doc, and the trace."""
    registration.install()
    # Reading thousands of task files, and asking the machine about itself, is most of what the command does.
    build = TaskIndex.build
    monkeypatch.setattr(
        TaskIndex, "build", staticmethod(lambda _, **options: build([registration.task_folder()], **options))
    )
    monkeypatch.setattr(evaluator, "add_env_info", lambda results: None)

    def run(model_args: str, *options: str):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        arguments = f"{model_args},hypernetwork={hypernetwork_dir},trace={tmp_path / 'trace.jsonl'}"
        metadata = json.dumps({"genpoe_data": str(docs_file)})
        fixed = (
            f"--model genpoe --tasks genpoe_demo --device cpu --log_samples --output_path {tmp_path / 'out'}".split()
        )
        monkeypatch.setattr(
            sys, "argv", ["lm_eval", *fixed, "--metadata", metadata, "--model_args", arguments, *options]
        )
        cli = HarnessCLI()
        cli.execute(cli.parse_args())
        (file,) = (tmp_path / "out").glob("*/samples_genpoe_demo_*.jsonl")
        samples = sorted(map(json.loads, file.read_text().splitlines()), key=lambda sample: sample["doc_id"])
        return samples, [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()]

    return run


def question(text: str) -> dict[str, str]:
    return {"role": "user", "content": f"Question: {text}\nAnswer:"}


SHOT_TURNS = [turn for text, answer in SHOTS for turn in (question(text), {"role": "assistant", "content": answer})]
SHOT_TEXT = "".join(f"Question: {text}\nAnswer: {answer}\n\n" for text, answer in SHOTS)
CHATS = {
    "no shots": ("", [], ""),
    "a system prompt": ("--system_instruction Briefly.", [{"role": "system", "content": "Briefly."}], ""),
    "shots in one turn": ("--num_fewshot 2 --fewshot_as_multiturn False", [], SHOT_TEXT),
    "a turn for each shot": ("--num_fewshot 2 --fewshot_as_multiturn True", SHOT_TURNS, ""),
}


@pytest.mark.parametrize("chat", CHATS)
def test_chat(lm_eval, chat_dir, docs, by_hand, expected_row, monkeypatch, chat):
    """Knowledge goes right before the task's own question, wherever that stands, and experts begin there."""
    options, turns, before = CHATS[chat]
    encode, seen = GenPoELM.tok_batch_encode, {}

    def noted(self, strings, *args, **kwargs):
        ids, mask = encode(self, strings, *args, **kwargs)
        for row, string in enumerate(strings):
            seen[string.selection.question.question] = (
                str(string),
                ids[row][mask[row].bool()],
                int(self._batch.rows.start[row]),
            )
        return ids, mask

    monkeypatch.setattr(GenPoELM, "tok_batch_encode", noted)
    flags = f"--apply_chat_template --batch_size 2 --limit 2 --gen_kwargs max_gen_toks=6 {options}"
    samples, trace = lm_eval(f"pretrained={chat_dir},mode=genpoe_rag", *flags.split())
    assert [line["question"] for line in trace] == [doc["question"] for doc in docs[:2]]
    for doc, sample in zip(docs, samples, strict=False):
        strings, gates = expected_row(doc)
        own = closed_book_prompt(doc["question"])
        content = before + knowledge_block(strings) + own
        rendered = jinja2.Template(TEMPLATE, keep_trailing_newline=True).render(
            messages=[*turns, {"role": "user", "content": content}],
            bos_token="<s>",
            eos_token="</s>",
            add_generation_prompt=True,
        )
        prompt, ids, start = seen[doc["question"]]
        assert prompt == rendered
        assert by_hand.tokenizer.decode(ids) == rendered, "no second BOS"
        assert by_hand.tokenizer.decode(ids[start:]) == rendered[rendered.rindex(own) :]
        expected, gap = by_hand.generate(rendered.removeprefix("<s>"), strings, gates, start, tokens=6)
        assert gap > 1e-4, "a near tie; choose another document"
        assert sample["resps"] == [[expected]]
        # What is logged, and hashed for the response cache, is what lm-eval asked.
        assert knowledge_block(strings) not in sample["arguments"]["gen_args_0"]["arg_0"]


@pytest.mark.parametrize("mode", ["genpoe", "genpoe_rag"])
def test_options_of_batches_answers_and_cache(lm_eval, llm_dir, docs, generation, make_lm, tmp_path, mode):
    flags = f"--batch_size auto --max_batch_size 4 --limit 5 --use_cache {tmp_path / 'cache'}"
    flags += " --gen_kwargs max_gen_toks=6,num_beams=2"
    asked = generation(docs[:5], max_gen_toks=6, num_beams=2)
    expected = make_lm(mode).generate_until(asked)
    before = None
    for _ in range(2):
        samples, trace = lm_eval(f"pretrained={llm_dir},mode={mode},max_length=512", *flags.split())
        assert [sample["resps"] for sample in samples] == [[[answer]] for answer in expected]
        assert [line["doc_id"] for line in trace] == list(range(5))
        assert before in (None, trace)
        before = trace
