"""Requests a second on vLLM: experts there, against experts on transformers and against the same LLM without any.

256 requests of one question each, with four passages of a hundred words of its own. Answers end where they end, after
eight tokens on average and 32 at most; once more all have 16 tokens, the same work for every LLM, and what suits
batches of transformers best. Timed is the whole of an lm-eval call but for the making of experts, which is the same
for both libraries and told alone. Between repeats vLLM forgets prompts and expert sets; the experts are kept, as they
are for a second task.
"""

from __future__ import annotations

import gc
import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from tokenizers import Tokenizer, models
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from benchmarks.options import Options, folder_of
from benchmarks.random_llm import END, MARKS
from benchmarks.row import Row
from benchmarks.training import LAYER, WIDTH, language_model, training_set
from genpoe_plugin.checkpoints.checkpoint import save_hypernetwork
from genpoe_plugin.experts.config import HypernetworkConfig
from genpoe_plugin.experts.hypernetwork import Hypernetwork
from genpoe_plugin.prompts import closed_book_prompt
from genpoe_plugin.vllm_engine.engine_arguments import check_vllm

REQUESTS, PASSAGES, REPEATS, BATCH = 256, 4, 3, 64
ENGINE = {"dtype": "float32", "max_model_len": 1024, "kv_cache_memory_bytes": 2**31, "disable_log_stats": True}
FORMS: dict[str, dict[str, Any]] = {"memory": {"base": "random"}, "paper": {"rank": 64}}
ANSWERS = {"until": ["\n"], "max_gen_toks": 32, "do_sample": False}
EQUAL = {"until": ["no such word"], "max_gen_toks": 16, "do_sample": False}


def requests(count: int, options: dict[str, Any]) -> list[Instance]:
    """Questions that bring their passages along."""
    examples = training_set(count * PASSAGES)
    asked = []
    for number in range(count):
        own = examples[number * PASSAGES : (number + 1) * PASSAGES]
        ctxs = [
            {"id": f"{number}-{rank}", "title": "", "text": example.passage, "score": "1", "rerank_score": -rank / 2}
            for rank, example in enumerate(own)
        ]
        doc = {"question": own[0].question, "answers": ["w1"], "ctxs": ctxs}
        context = closed_book_prompt(doc["question"])
        asked.append(Instance("generate_until", doc, (context, options), 0, ("benchmark", number, 1)))
    return asked


def ending_words(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tokenizer with a line break at the end of every eighth word, so that a random LLM ends its answers."""
    vocabulary = {
        f"{word}\n" if n % 8 == 0 and n >= len(MARKS) else word: n for word, n in tokenizer.get_vocab().items()
    }
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizer.backend_tokenizer.pre_tokenizer
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token=END, pad_token=END)


def write_parts(folder: Path) -> dict[str, str]:
    """An LLM, and a hypernetwork of either form whose experts speak."""
    model, words = language_model()
    tokenizer = ending_words(words)
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder / "llm")
    tokenizer.save_pretrained(folder / "llm")
    for preset, changes in FORMS.items():
        config = HypernetworkConfig.preset(preset, hidden_size=WIDTH, layer=LAYER, **changes)
        save_hypernetwork(folder / preset, Hypernetwork(config), model, tokenizer, {})
    return {name: str(folder / name) for name in ("llm", *FORMS)}


def forget(lm: Any) -> None:
    """Have an engine meet every prompt and every expert set for the first time again."""
    engine = getattr(lm.model, "llm_engine", None)
    if engine is not None:
        engine.reset_prefix_cache()
        for number in engine.list_loras() if lm.store is not None else ():
            engine.remove_lora(number)


def requests_per_second(lm: Any, asked: Sequence[Instance], repeats: int, name: str) -> float:
    """By the median time of the repeats, after a pass that makes the experts and warms everything else up."""
    taken = []
    for _ in tqdm(range(1 + repeats), desc=name):
        forget(lm)
        before = lm.seconds["generate"]
        lm.generate_until(list(asked), disable_tqdm=True)
        taken.append(lm.seconds["generate"] - before)
    return len(asked) / statistics.median(taken[1:])


def measure(options: Options) -> list[Row]:
    """Every model class in its turn, and the ratios."""
    check_vllm()
    # With one process, no core of a small machine is set aside for the other.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from genpoe_plugin.lm.hf import GenPoELM
    from genpoe_plugin.lm.vllm import GenPoEVLLM

    count, repeats = (32, 1) if options.quick else (REQUESTS, REPEATS)
    answers, equal = requests(count, ANSWERS), requests(count, EQUAL)
    rate: dict[str, float] = {}
    making = 0.0
    with folder_of(options) as folder:
        parts = write_parts(folder)

        def hf() -> Any:
            arguments = {"device": "cpu", "dtype": "float32", "batch_size": BATCH}
            return GenPoELM(parts["llm"], hypernetwork=parts["memory"], **arguments)

        def vllm(mode: str, form: str = "memory") -> Any:
            return GenPoEVLLM(parts["llm"], mode=mode, hypernetwork=parts[form], max_num_seqs=REQUESTS, **ENGINE)

        made: dict[str, Callable[[], Any]] = {
            "hf": hf,
            "plain_closed_book": lambda: vllm("closed_book"),
            "experts": lambda: vllm("genpoe"),
            "paper_experts": lambda: vllm("genpoe", "paper"),
        }
        for name, make in made.items():
            lm = make()
            rate[name] = requests_per_second(lm, answers, repeats, name)
            rate[f"{name}_equal"] = requests_per_second(lm, equal, repeats, f"{name}, equal lengths")
            if name == "experts":
                making = lm.seconds["experts"]
            del lm
            gc.collect()
        # Prompts so long take most of the time, and every one of them as long as the next.
        rate["plain_rag"] = requests_per_second(vllm("rag"), answers[: count // 4], 1, "plain_rag")
    cold = count / (making + count / rate["experts"])
    return [
        *(Row(f"vllm.{name}_requests_per_second", value, "requests/s") for name, value in rate.items()),
        Row("vllm.experts_made_per_second", count * PASSAGES / making, "experts/s"),
        Row("vllm.over_hf", rate["experts"] / rate["hf"], "x", ">= 2"),
        Row("vllm.over_hf_equal_lengths", rate["experts_equal"] / rate["hf_equal"], "x"),
        Row("vllm.over_plain_closed_book", rate["experts_equal"] / rate["plain_closed_book_equal"], "x", ">= 0.6"),
        Row("vllm.paper_over_plain_closed_book", rate["paper_experts_equal"] / rate["plain_closed_book_equal"], "x"),
        Row("vllm.over_rag", rate["experts"] / rate["plain_rag"], "x"),
        Row("vllm.over_rag_with_experts_made", cold / rate["plain_rag"], "x"),
    ]
