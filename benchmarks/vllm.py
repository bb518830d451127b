"""Requests per second on vLLM with experts, against experts on transformers and against vLLM without experts.

There are 256 requests of one question each, each with its own four passages of a hundred words. Answers have eight
tokens on average and at most 32. They are sampled: a greedy random LLM repeats itself, and the lengths of its answers
depend on the form of the experts. A second measurement has 16 tokens in all answers: the same work for every variant,
and the best case for batches on transformers. Times cover the whole lm-eval call except generating experts, which is
the same for both libraries and has rows of its own. Between repeats, vLLM's caches of prompts and expert sets are
cleared; the experts stay in the store, as they do for a second task.
"""

from __future__ import annotations

import gc
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from tokenizers import Tokenizer, models
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from benchmarks.evaluation import reading_layers
from benchmarks.options import Options, folder_of
from benchmarks.random_llm import END, MARKS
from benchmarks.row import Row
from benchmarks.training import LAYER, LAYERS, WIDTH, language_model, training_set
from genpoe_plugin.checkpoints.checkpoint import save_hypernetwork
from genpoe_plugin.experts.config import HypernetworkConfig
from genpoe_plugin.experts.hypernetwork import Hypernetwork
from genpoe_plugin.prompts import closed_book_prompt
from genpoe_plugin.training.creation import attention_config
from genpoe_plugin.vllm_engine.engine_arguments import check_vllm

REQUESTS, PASSAGES, REPEATS, BATCH = 256, 4, 3, 64
ENGINE = {"dtype": "float32", "max_model_len": 1024, "kv_cache_memory_bytes": 2**31, "disable_log_stats": True}
FORMS: dict[str, dict[str, Any]] = {"memory": {"base": "random"}, "paper": {"rank": 64}}
ATTENTION = "attention"
ANSWERS = {"until": ["\n"], "max_gen_toks": 32, "do_sample": True, "temperature": 1.0}
EQUAL = {"until": ["no such word"], "max_gen_toks": 16, "do_sample": False}


def requests(count: int, options: dict[str, Any]) -> list[Instance]:
    """lm-eval requests whose docs bring their passages."""
    examples = training_set(count * PASSAGES)
    instances = []
    for number in range(count):
        own = examples[number * PASSAGES : (number + 1) * PASSAGES]
        ctxs = [
            {"id": f"{number}-{rank}", "title": "", "text": example.passage, "score": "1", "rerank_score": -rank / 2}
            for rank, example in enumerate(own)
        ]
        doc = {"question": own[0].question, "answers": ["w1"], "ctxs": ctxs}
        context = closed_book_prompt(doc["question"])
        instances.append(Instance("generate_until", doc, (context, options), 0, ("benchmark", number, 1)))
    return instances


def ending_words(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tokenizer with a line break after every eighth word, so that a random LLM ends its answers."""
    vocabulary = {
        f"{word}\n" if n % 8 == 0 and n >= len(MARKS) else word: n for word, n in tokenizer.get_vocab().items()
    }
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizer.backend_tokenizer.pre_tokenizer
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token=END, pad_token=END)


def write_parts(folder: Path) -> dict[str, str]:
    """Write an LLM and a hypernetwork of each form, whose experts change its answers."""
    model, words = language_model()
    tokenizer = ending_words(words)
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder / "llm")
    tokenizer.save_pretrained(folder / "llm")
    for preset, changes in FORMS.items():
        config = HypernetworkConfig.preset(preset, hidden_size=WIDTH, layer=LAYER, **changes)
        save_hypernetwork(folder / preset, Hypernetwork(config), model, tokenizer, {})
    # The form that `training` measures.
    attention = replace(attention_config(model, reading_layers(LAYERS)), addition_rank=64, window=4)
    save_hypernetwork(folder / ATTENTION, Hypernetwork(attention), model, tokenizer, {})
    return {name: str(folder / name) for name in ("llm", *FORMS, ATTENTION)}


def run_in_one_process() -> None:
    """Let vLLM run quietly in this process, where it does not reserve a core of a small machine for a second one.

    Call it before vLLM is imported.
    """
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


def clear_caches(lm: Any) -> None:
    """Clear the prompts and expert sets that a vLLM engine has cached."""
    engine = getattr(lm.model, "llm_engine", None)
    if engine is not None:
        engine.reset_prefix_cache()
        for number in engine.list_loras() if lm.store is not None else ():
            engine.remove_lora(number)


def requests_per_second(lm: Any, instances: Sequence[Instance], repeats: int, name: str) -> float:
    """Rate by the median time of the repeats, after a warm-up pass that also generates the experts."""
    taken = []
    for _ in tqdm(range(1 + repeats), desc=name):
        clear_caches(lm)
        before = lm.seconds["generate"]
        lm.generate_until(list(instances), disable_tqdm=True)
        taken.append(lm.seconds["generate"] - before)
    return len(instances) / statistics.median(taken[1:])


def measure(options: Options) -> list[Row]:
    """Measure every model class, one after the other, and the ratios."""
    check_vllm()
    run_in_one_process()
    from genpoe_plugin.lm.hf import GenPoELM
    from genpoe_plugin.lm.vllm import GenPoEVLLM

    count, repeats = (32, 1) if options.quick else (REQUESTS, REPEATS)
    answers, equal = requests(count, ANSWERS), requests(count, EQUAL)
    rate: dict[str, float] = {}
    expert_seconds = 0.0
    with folder_of(options) as folder:
        parts = write_parts(folder)

        def hf(form: str = "memory") -> Any:
            arguments = {"device": "cpu", "dtype": "float32", "batch_size": BATCH}
            return GenPoELM(parts["llm"], hypernetwork=parts[form], **arguments)

        def vllm(mode: str, form: str = "memory") -> Any:
            return GenPoEVLLM(parts["llm"], mode=mode, hypernetwork=parts[form], max_num_seqs=REQUESTS, **ENGINE)

        constructors: dict[str, Callable[[], Any]] = {
            "hf": hf,
            "hf_attention": lambda: hf(ATTENTION),
            "plain_closed_book": lambda: vllm("closed_book"),
            "experts": lambda: vllm("genpoe"),
            "paper_experts": lambda: vllm("genpoe", "paper"),
            "attention_experts": lambda: vllm("genpoe", ATTENTION),
        }
        for name, construct in constructors.items():
            lm = construct()
            # A pass on transformers is long enough.
            times = 1 if name.startswith("hf") else repeats
            rate[name] = requests_per_second(lm, answers, times, name)
            rate[f"{name}_equal"] = requests_per_second(lm, equal, times, f"{name}, equal lengths")
            if name == "experts":
                expert_seconds = lm.seconds["experts"]
            del lm
            gc.collect()
        # Long prompts take most of the time and are equally long, so a quarter of the requests is enough.
        rate["plain_rag"] = requests_per_second(vllm("rag"), answers[: count // 4], 1, "plain_rag")
    attention = rate["attention_experts_equal"]
    cold = count / (expert_seconds + count / rate["experts"])
    return [
        *(Row(f"vllm.{name}_requests_per_second", value, "requests/s") for name, value in rate.items()),
        Row("vllm.experts_made_per_second", count * PASSAGES / expert_seconds, "experts/s"),
        Row("vllm.over_hf", rate["experts"] / rate["hf"], "x", ">= 2"),
        Row("vllm.over_hf_equal_lengths", rate["experts_equal"] / rate["hf_equal"], "x"),
        Row("vllm.over_plain_closed_book", rate["experts_equal"] / rate["plain_closed_book_equal"], "x", ">= 0.6"),
        Row("vllm.paper_over_plain_closed_book", rate["paper_experts_equal"] / rate["plain_closed_book_equal"], "x"),
        Row("vllm.over_rag", rate["experts"] / rate["plain_rag"], "x"),
        Row("vllm.over_rag_with_experts_made", cold / rate["plain_rag"], "x"),
        Row("vllm.attention_over_hf", rate["attention_experts"] / rate["hf_attention"], "x", ">= 2"),
        Row("vllm.attention_over_plain_closed_book", attention / rate["plain_closed_book_equal"], "x", ">= 0.6"),
        Row("vllm.attention_over_rag", rate["attention_experts"] / rate["plain_rag"], "x", ">= 2"),
    ]
