"""Experts on vLLM in several processes: tokens must be those of one process.

Every form of expert runs with tensor parallelism and with pipeline parallelism, with vLLM's own workers and with Ray.
Requests have no to three passages, and experts that act from the first token (``genpoe``) or from the question after a
passage in the prompt (``genpoe_rag``). Prompts are computed in several chunks. A layout that does not start has the row
``failed``. Layouts with Ray are left out where Ray is not installed, or vLLM does not support it: vLLM 0.32 on CPUs.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.child import run_child
from benchmarks.options import Options, folder_of
from benchmarks.random_llm import random_llm, random_text
from benchmarks.row import Row
from genpoe_plugin.checkpoints.checkpoint import save_hypernetwork
from genpoe_plugin.experts.config import HypernetworkConfig
from genpoe_plugin.experts.hypernetwork import Hypernetwork
from genpoe_plugin.prompts import closed_book_prompt, rag_prompt
from genpoe_plugin.training.creation import attention_config
from genpoe_plugin.vllm_engine.engine_arguments import check_vllm

REQUESTS, NEW_TOKENS, PASSAGES = 48, 8, 3
WIDTH, LAYERS, HEAD_WIDTH, KV_HEADS = 192, 4, 32, 2
READ = (0, 2)  # with pipeline parallelism, one in each stage
ONE = "one_process"
LAYOUTS: dict[str, dict[str, Any]] = {
    ONE: {},
    "tensor": {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"},
    "pipeline": {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"},
    "ray_tensor": {"tensor_parallel_size": 2, "distributed_executor_backend": "ray"},
    "ray_pipeline": {"pipeline_parallel_size": 2, "distributed_executor_backend": "ray"},
}
QUICK = (ONE, "tensor")
ENGINE = {
    "dtype": "float32",
    "max_model_len": 512,
    "kv_cache_memory_bytes": 2**26,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 64,
    "max_loras": 8,
    "max_cpu_loras": 16,
    "enforce_eager": True,
    "disable_log_stats": True,
}


def measure(options: Options) -> list[Row]:
    """Compare every layout with one process, form by form."""
    check_vllm()
    rows = []
    with folder_of(options) as folder:
        forms = write_parts(folder)
        layouts = [name for name in LAYOUTS if "ray" not in name or _has_ray()]
        for form in forms[-1:] if options.quick else forms:
            found = {}
            for layout in QUICK if options.quick else layouts:
                found[layout] = run_layout(folder, form, layout)
            one = found.pop(ONE)
            if one is None:
                raise RuntimeError(f"{form}: one process failed")
            changed = sum(tokens != plain for (tokens, _), plain in zip(one["experts"], one["plain"], strict=True))
            rows.append(Row(f"vllm_processes.{form}.changed_by_experts", changed, "requests", f">= {REQUESTS // 3}"))
            for layout, other in found.items():
                rows += _rows(f"vllm_processes.{form}.{layout}", one, other)
    return rows


def _rows(name: str, one: dict[str, Any], other: dict[str, Any] | None) -> list[Row]:
    if other is None:
        return [Row(f"{name}.failed", 1, "", "<= 0")]
    pairs = list(zip(one["experts"], other["experts"], strict=True))
    different = sum(tokens != own for (tokens, _), (own, _) in pairs)
    apart = max(abs(a - b) for (_, values), (_, own) in pairs for a, b in zip(values, own, strict=True))
    return [Row(f"{name}.different", different, "requests", "<= 0"), Row(f"{name}.apart", apart, "nats", "<= 0.001")]


def _has_ray() -> bool:
    from vllm.platforms import current_platform

    return find_spec("ray") is not None and bool(current_platform.ray_device_key)


def write_parts(folder: Path) -> list[str]:
    """Write a random LLM and a hypernetwork of each form; returns the names of the forms."""
    model, tokenizer = random_llm(WIDTH, LAYERS, head_width=HEAD_WIDTH, kv_heads=KV_HEADS)
    model.save_pretrained(folder / "llm")
    tokenizer.save_pretrained(folder / "llm")
    attention = attention_config(model, READ)
    configs = {
        "paper": HypernetworkConfig.preset("paper", hidden_size=WIDTH, layer=1, rank=16, expert_width=96),
        "memory": HypernetworkConfig.preset("memory", hidden_size=WIDTH, layer=1, base="random"),
        "attention": attention,
        "trained_attention": replace(attention, addition_rank=8, query_rank=4, window=4),
    }
    for form, config in configs.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = Hypernetwork(config)
            if form == "trained_attention":
                # Additions are zero before training.
                for parameter in network.parameters():
                    nn.init.normal_(parameter, std=0.1)
        save_hypernetwork(folder / form, network.eval(), model, tokenizer, {})
    return list(configs)


def run_layout(folder: Path, form: str, layout: str) -> dict[str, Any] | None:
    """What an engine in its own process generates; None if it fails."""
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    if layout == ONE:
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    record = folder / f"{form}.{layout}.json"
    try:
        # The workers write to the standard output too.
        run_child(["-m", "benchmarks.vllm_processes", folder, form, layout, record], environment)
    except RuntimeError as error:
        print(f"{form}, {layout}: {error}", file=sys.stderr)
        return None
    result: dict[str, Any] = json.loads(record.read_text())
    return result


def run(folder: Path, form: str, layout: str) -> dict[str, Any]:
    """Tokens and their log-probabilities of all requests, and the tokens without experts."""
    from genpoe_plugin.vllm_engine.engine import ExpertEngine

    engine = ExpertEngine.load(
        str(folder / "llm"), str(folder / form), num_passages=PASSAGES, **ENGINE, **LAYOUTS[layout]
    )
    with_experts, plain = requests(engine)
    outputs = [output.outputs[0] for output in engine.generate(with_experts, progress=False)]
    tokens = [list(output.token_ids) for output in outputs]
    values = [
        [entry[token].logprob for token, entry in zip(ids, output.logprobs, strict=True)]
        for ids, output in zip(tokens, outputs, strict=True)
    ]
    without = [list(output.outputs[0].token_ids) for output in engine.generate(plain, progress=False)]
    return {"experts": list(zip(tokens, values, strict=True)), "plain": without}


def requests(engine: Any) -> tuple[Sequence[Any], Sequence[Any]]:
    """Requests with experts, and the same without them."""
    from vllm import SamplingParams

    rng = random.Random(0)
    with_experts, plain = [], []
    for number in range(REQUESTS):
        passages = [random_text(rng, rng.randint(5, 60)) for _ in range(number % (PASSAGES + 1))]
        question = f"Who {random_text(rng, rng.randint(3, 30))} ?"
        prompt, start = closed_book_prompt(question), 0
        if number % 2:
            prompt = rag_prompt(question, [random_text(rng, 40)])
            start = prompt.rindex("Question:")
        weights = [rng.random() + 0.1 for _ in passages]
        gates = [weight / sum(weights) for weight in weights]

        def sampling() -> SamplingParams:
            return SamplingParams(temperature=0, max_tokens=NEW_TOKENS, logprobs=0)

        with_experts.append(engine.request(prompt, passages, sampling(), gates=gates, start=start))
        plain.append(engine.request(prompt, [], sampling()))
    return with_experts, plain


if __name__ == "__main__":
    Path(sys.argv[4]).write_text(json.dumps(run(Path(sys.argv[1]), *sys.argv[2:4])))
