"""What needs a GPU, in minutes and without network: the same scores as on a CPU, the store, costs, FAISS and vLLM.

All LLMs have random weights. Parts whose libraries are not installed (bitsandbytes, FAISS for GPUs, vLLM) are left out.
With ``--quick``, everything is small and runs on the CPU if there is no GPU.
"""

from __future__ import annotations

import gc
import logging
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.evaluation import PASSAGES, WORDS, reading_layers
from benchmarks.memory import peak_bytes
from benchmarks.options import Options
from benchmarks.random_llm import random_llm, random_text
from benchmarks.rates import seconds
from benchmarks.real_size import card_of, time_variants, variant_rows
from benchmarks.row import Row
from genpoe_plugin import GenPoEModel
from genpoe_plugin.checkpoints.checkpoint import load_hypernetwork, save_hypernetwork
from genpoe_plugin.errors import InputError
from genpoe_plugin.experts.config import PRESETS, HypernetworkConfig
from genpoe_plugin.experts.footprint import footprint
from genpoe_plugin.experts.generator import attention_dimensions
from genpoe_plugin.experts.hypernetwork import Hypernetwork
from genpoe_plugin.experts.store import MAX_EXPERT_UNITS, ExpertStore
from genpoe_plugin.retrieval.faiss_setup import faiss
from genpoe_plugin.training.creation import attention_config, create_attention_experts


@dataclass(frozen=True)
class Sizes:
    """Sizes of the parts: the small LLM that is compared with the CPU, the large one that is timed, and vectors."""

    small: tuple[int, int, int]  # width, layers, head width
    large: tuple[int, int, int, int]  # width, layers, head width, key-value heads
    batch: int
    rounds: int
    vectors: int


FULL = Sizes((512, 6, 64), (4096, 32, 128, 8), 32, 3, 500_000)
QUICK = Sizes((64, 3, 16), (64, 4, 16, 2), 2, 1, 2_000)


def measure(options: Options) -> list[Row]:
    """The rows of all parts.

    Raises:
        InputError: there is no GPU for the full size.
    """
    available = torch.cuda.is_available()
    if not (options.quick or available):
        raise InputError("gpu: needs a GPU of 40 GB; --quick runs small LLMs on a CPU")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # each new object warns that it got a loaded model
    sizes, device = (QUICK if options.quick else FULL), "cuda" if available else "cpu"
    rows = [*same_scores(sizes, device), *store_rows(sizes, device), *cost_rows(sizes, device)]
    if find_spec("bitsandbytes") and available:
        rows += quantised_rows(sizes, device)
    rows += search_rows(sizes)
    if find_spec("vllm"):
        from benchmarks import vllm

        _free(device)
        rows += vllm.measure(replace(options, quick=True))
    return rows


def same_scores(sizes: Sizes, device: str) -> Iterator[Row]:
    """For every form, the largest difference between log-likelihoods on the device and on a CPU, in float32."""
    width, layers, head = sizes.small
    models = {place: random_llm(width, layers, head_width=head, device=place) for place in ("cpu", device)}
    for preset in PRESETS:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = _checkpoint(Path(folder), preset, *models["cpu"])
            scores = {place: _scores(*models[place], checkpoint) for place in models}
            plain = _scores(*models["cpu"], checkpoint, mode="closed_book")
        if np.allclose(scores["cpu"], plain):
            raise RuntimeError(f"{preset}: experts change no score")
        difference = float(np.abs(np.subtract(scores["cpu"], scores[device])).max())
        yield Row(f"gpu.score_difference_{preset}", difference, "nats", "<= 0.01")


def _checkpoint(folder: Path, preset: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Path:
    """An untrained checkpoint of a form, whose experts change the LLM: in two layers, or in the middle one."""
    config = model.config
    attention = PRESETS[preset]["head"] == "attention"
    changes = attention_dimensions(model) if attention else {"base": "random"}
    depth = config.num_hidden_layers
    layers = [depth // 3, depth // 2 + 1] if attention else [depth // 2]
    torch.manual_seed(0)
    form = HypernetworkConfig.preset(preset, hidden_size=config.hidden_size, layers=layers, **changes)
    save_hypernetwork(folder / preset, Hypernetwork(form), model, tokenizer, {})
    return folder / preset


def _texts(questions: int) -> tuple[list[str], list[str], list[list[str]]]:
    """Questions, answers and passages of random words."""
    rng = random.Random(0)
    passages = [[random_text(rng, WORDS) for _ in range(PASSAGES)] for _ in range(questions)]
    return [random_text(rng, 9) for _ in passages], [random_text(rng, 2) for _ in passages], passages


def _scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, checkpoint: Path, mode: str = "genpoe"
) -> list[float]:
    questions, answers, passages = _texts(4)
    scorer = GenPoEModel.from_pretrained(model, checkpoint, tokenizer=tokenizer)
    return list(scorer.score(questions, answers, None if mode == "closed_book" else passages, mode=mode))


def store_rows(sizes: Sizes, device: str) -> Iterator[Row]:
    """Experts that were moved to the host's memory and back are the same; memory of stored experts by the estimate."""
    width, layers, head = sizes.small
    model, tokenizer = random_llm(width, layers, head_width=head, device=device, dtype=torch.bfloat16)
    passages = [text for texts in _texts(8)[2] for text in texts]
    with tempfile.TemporaryDirectory() as folder:
        hypernetwork = load_hypernetwork(_checkpoint(Path(folder), "attention", model, tokenizer), model, tokenizer)
    size = footprint(hypernetwork.config, model.dtype).expert_bytes
    # One passage at a time, so that every expert is computed in the same way.
    large = ExpertStore(hypernetwork, model, tokenizer, batch_size=1)
    small = ExpertStore(hypernetwork, model, tokenizer, device_bytes=MAX_EXPERT_UNITS * size, batch_size=1)
    for store in (large, small):
        store.prepare(passages, progress=False)
    differences = [
        (one.float() - other.float()).abs().max().item()
        for passage in passages
        for ours, theirs in zip(large.experts([[passage]]), small.experts([[passage]]), strict=True)
        for one, other in zip(ours.weights, theirs.weights, strict=True)
    ]
    yield Row("gpu.host_store_difference", max(differences), "", "<= 0")
    fresh = ExpertStore(hypernetwork, model, tokenizer)
    estimate = fresh.nbytes(passages)
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        fresh.prepare(passages, progress=False)
        measured = torch.cuda.memory_allocated() - before
    else:
        measured = peak_bytes(lambda: fresh._device_pool.reserve(sum(fresh.units(passages))))
    yield Row("gpu.expert_memory_ratio", measured / estimate, "x", "<= 1.1")


def cost_rows(sizes: Sizes, device: str) -> list[Row]:
    """Cost of experts in a quarter of the layers of an LLM of 7B shapes in bfloat16, against closed-book and RAG."""
    width, layers, head, kv_heads = sizes.large
    _free(device)
    model, tokenizer = random_llm(
        width, layers, head_width=head, kv_heads=kv_heads, device=device, dtype=torch.bfloat16
    )
    config = attention_config(model, reading_layers(layers))
    plain = HFLM(model, tokenizer=tokenizer, device=device, batch_size=sizes.batch)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "attention"
        create_attention_experts(checkpoint, config, model, tokenizer, None, card_of(checkpoint))
        rows = variant_rows(time_variants(plain, checkpoint, sizes.batch, sizes.rounds), sizes.batch)
    rows = [replace(row, name=row.name.replace("real_size.", "gpu.")) for row in rows]
    if device == "cuda":
        rows.append(Row("gpu.peak_memory", torch.cuda.max_memory_allocated() / 1e9, "GB"))
    return rows


def quantised_rows(sizes: Sizes, device: str) -> list[Row]:
    """Experts in an LLM of the same width in four bits (bitsandbytes), two layers deep, against closed-book scores."""
    width, _, head, kv_heads = sizes.large
    _free(device)
    model, tokenizer = random_llm(width, 2, head_width=head, kv_heads=kv_heads, device=device, dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "attention"
        create_attention_experts(checkpoint, attention_config(model, (1,)), model, tokenizer, None, card_of(checkpoint))
        model.save_pretrained(Path(folder) / "llm")
        del model
        four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
        quantised = AutoModelForCausalLM.from_pretrained(
            Path(folder) / "llm", quantization_config=four_bits, device_map=device
        )
        experts, plain = (_scores(quantised, tokenizer, checkpoint, mode) for mode in ("genpoe", "closed_book"))
    changed = float(np.mean(~np.isclose(experts, plain) & np.isfinite(experts)))
    return [Row("gpu.quantised_scores_changed", changed, "share", ">= 1")]


def search_rows(sizes: Sizes) -> list[Row]:
    """Exact search on all GPUs against the CPU: time, and the share of equal rows. Empty without FAISS for GPUs."""
    if not faiss.get_num_gpus():
        return []
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((sizes.vectors, 768), np.float32)
    queries = rng.standard_normal((64, 768), np.float32)
    on_cpu = faiss.IndexFlatIP(768)
    on_cpu.add(vectors)
    on_gpu = faiss.index_cpu_to_all_gpus(on_cpu)
    equal = float(np.mean(on_cpu.search(queries, 20)[1] == on_gpu.search(queries, 20)[1]))
    times = [seconds(lambda index=index: index.search(queries, 20)) for index in (on_cpu, on_gpu)]
    return [
        Row("gpu.search_equal_rows", equal, "share", ">= 0.99"),
        Row("gpu.search_speedup", times[0] / times[1], "x", ">= 1"),
    ]


def _free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
