"""Requests a second on vLLM: experts there, against experts on transformers and against the same LLM without any.

256 requests of one question each, with four passages of a hundred words of its own, and answers of 16 tokens. Timed is
the whole of an lm-eval call but for the making of experts, which is the same work for both libraries and told alone.
Between repeats vLLM forgets prompts and expert sets; the experts themselves are kept, as they are for a second task.
"""

from __future__ import annotations

import gc
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from tqdm import tqdm

from benchmarks.options import Options, folder_of
from benchmarks.row import Row
from benchmarks.training import LAYER, WIDTH, language_model, training_set
from genpoe_plugin.checkpoint import save_hypernetwork
from genpoe_plugin.experts.config import HypernetworkConfig
from genpoe_plugin.experts.hypernetwork import Hypernetwork
from genpoe_plugin.prompts import closed_book_prompt
from genpoe_plugin.vllm_engine.arguments import check_vllm

REQUESTS, PASSAGES, TOKENS, REPEATS, BATCH = 256, 4, 16, 3, 64
ENGINE = {"dtype": "float32", "max_model_len": 1024, "kv_cache_memory_bytes": 2**31, "disable_log_stats": True}
FORMS = {"recommended": {}, "paper": {"rank": 64}}


def requests(count: int) -> list[Instance]:
    examples = training_set(count * PASSAGES)
    asked = []
    for number in range(count):
        own = examples[number * PASSAGES : (number + 1) * PASSAGES]
        ctxs = [
            {"id": f"{number}-{rank}", "title": "", "text": example.passage, "score": "1", "rerank_score": -rank / 2}
            for rank, example in enumerate(own)
        ]
        doc = {"question": own[0].question, "answers": ["w1"], "ctxs": ctxs}
        options = {"until": ["\n"], "max_gen_toks": TOKENS, "do_sample": False}
        context = closed_book_prompt(doc["question"])
        asked.append(Instance("generate_until", doc, (context, options), 0, ("benchmark", number, 1)))
    return asked


def write_parts(folder: Path) -> dict[str, str]:
    """An LLM, and a hypernetwork of either form whose experts speak."""
    model, tokenizer = language_model()
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    tokenizer.pad_token = tokenizer.eos_token = "<unk>"
    model.save_pretrained(folder / "llm")
    tokenizer.save_pretrained(folder / "llm")
    for preset, changes in FORMS.items():
        config = HypernetworkConfig.preset(preset, hidden_size=WIDTH, layer=LAYER, **{"base": "random"} | changes)
        save_hypernetwork(folder / preset, Hypernetwork(config), model, tokenizer, {})
    return {name: str(folder / name) for name in ("llm", *FORMS)}


def forget(lm: Any) -> None:
    """Have an engine meet every prompt and every expert set for the first time again."""
    engine = getattr(lm.model, "llm_engine", None)
    if engine is not None:
        engine.reset_prefix_cache()
        if lm.store is not None:
            for number in engine.list_loras():
                engine.remove_lora(number)


def seconds(lm: Any, asked: list[Instance], repeats: int, name: str) -> float:
    """The median over repeats, after one that makes the experts and warms everything else up."""
    taken = []
    for _ in tqdm(range(1 + repeats), desc=name):
        forget(lm)
        before = lm.seconds["generate"]
        lm.generate_until(asked, disable_tqdm=True)
        taken.append(lm.seconds["generate"] - before)
    return statistics.median(taken[1:])


def measure(options: Options) -> list[Row]:
    """Every model class in its turn, and the ratios."""
    check_vllm()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from genpoe_plugin.lm import GenPoELM
    from genpoe_plugin.vllm_lm import GenPoEVLLM

    asked = requests(32 if options.quick else REQUESTS)
    repeats = 1 if options.quick else REPEATS
    with folder_of(options) as folder:
        parts = write_parts(folder)

        def transformers(**arguments: Any) -> Any:
            return GenPoELM(parts["llm"], device="cpu", dtype="float32", batch_size=BATCH, **arguments)

        def vllm(**arguments: Any) -> Any:
            return GenPoEVLLM(parts["llm"], max_num_seqs=REQUESTS, **ENGINE, **arguments)

        made: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
            "hf_closed_book": (transformers, {"mode": "closed_book"}),
            "hf": (transformers, {"mode": "genpoe", "hypernetwork": parts["recommended"]}),
            "plain_closed_book": (vllm, {"mode": "closed_book"}),
            "experts": (vllm, {"mode": "genpoe", "hypernetwork": parts["recommended"]}),
            "paper_experts": (vllm, {"mode": "genpoe", "hypernetwork": parts["paper"]}),
            "rag": (vllm, {"mode": "rag"}),
        }
        rate: dict[str, float] = {}
        making = 0.0
        for name, (make, arguments) in made.items():
            lm = make(**arguments)
            rate[name] = len(asked) / seconds(lm, asked, 1 if name == "rag" else repeats, name)
            if name == "experts":
                making = lm.seconds["experts"]
            del lm
            gc.collect()
    cold = len(asked) / (making + len(asked) / rate["experts"])
    return [
        *(Row(f"vllm.{name}_requests_per_second", value, "requests/s") for name, value in rate.items()),
        Row("vllm.experts_made_per_second", len(asked) * PASSAGES / making, "experts/s"),
        Row("vllm.over_hf", rate["experts"] / rate["hf"], "x", ">= 2"),
        Row("vllm.over_plain_closed_book", rate["experts"] / rate["plain_closed_book"], "x", ">= 0.6"),
        Row("vllm.paper_over_plain_closed_book", rate["paper_experts"] / rate["plain_closed_book"], "x"),
        Row("vllm.over_rag", rate["experts"] / rate["rag"], "x"),
        Row("vllm.over_rag_with_experts_made", cold / rate["rag"], "x"),
    ]
