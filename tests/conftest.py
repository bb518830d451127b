"""Tiny models made on the spot. Everything runs offline and on one thread, so that results repeat."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import socket
import traceback

# Read by the libraries when they are imported, so set before any of them.
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate.state import AcceleratorState
from huggingface_hub import constants, hf_api
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from genpoe_plugin.experts.expert import DenseExperts, Experts, FactoredExperts
from tests.hub_server import Hub, serve_hub

torch.set_num_threads(1)

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
SENTENCES = [
    "Question: Who wrote the opera about a barber?\nAnswer: Gioachino Rossini\n",
    "Knowledge:\nRossini: Gioachino Rossini was an Italian composer born in Pesaro in 1792.\n",
    "Marie Curie: Marie Curie discovered polonium and radium, and won two Nobel prizes.\n",
    "Question: Where is the capital of the country, and when was it founded?\nAnswer: Canberra, 1913\n",
    "The quick brown fox jumps over the lazy dog; naïve façade, Zürich, 東京.",
]

# What differs between families; the sizes that they share are in make_llm. gpt_neox and gpt2 have plain MLPs.
FAMILIES: dict[str, tuple[str, dict[str, int]]] = {
    "llama": ("Llama", {"intermediate_size": 48, "num_key_value_heads": 2}),
    "mistral": ("Mistral", {"intermediate_size": 48, "num_key_value_heads": 2}),
    "qwen2": ("Qwen2", {"intermediate_size": 48, "num_key_value_heads": 2}),
    "qwen3": ("Qwen3", {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}),
    "gemma": ("Gemma", {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}),
    "gemma2": ("Gemma2", {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}),
    "gemma3": ("Gemma3", {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}),
    "phi": ("Phi", {"intermediate_size": 48}),
    "phi3": ("Phi3", {"intermediate_size": 48, "num_key_value_heads": 2}),
    "gpt_neox": ("GPTNeoX", {"intermediate_size": 48}),
    "gpt2": ("GPT2", {"n_inner": 48}),
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with all the hub's data sets that tasks ask, one question each, which are loaded from there."""
    import datasets

    from tests.data_sets import write_hub

    root = tmp_path / "hub"
    write_hub(root)
    load = datasets.load_dataset

    def load_dataset(name: str, *arguments: Any, **options: Any) -> Any:
        return load(str(root / name), *arguments, cache_dir=str(tmp_path / "hub-cache"), **options)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return root


@pytest.fixture
def model_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub's stand-in on this machine, in its place; nobody is logged in, and nothing is in the cache."""
    with serve_hub() as served:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{served.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        )
        # What a hub is asked with is kept by both libraries, its address included.
        monkeypatch.setattr(hf_api.api, "endpoint", served.url)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hub-token"))
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        yield served


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that begins every text with BOS and pads on the left."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=[BOS, EOS, PAD],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=BOS, eos_token=EOS, pad_token=PAD, padding_side="left", model_max_length=2048
    )


@pytest.fixture(scope="session")
def bare_tokenizer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same, but nothing is put before a text."""
    bare = copy.deepcopy(tokenizer)
    bare.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    assert bare("Who?")["input_ids"] == tokenizer("Who?", add_special_tokens=False)["input_ids"]
    return bare


@pytest.fixture(scope="session")
def make_llm(tokenizer: PreTrainedTokenizerFast) -> Callable[..., PreTrainedModel]:
    """``make_llm(family, seed=0, **config)``: a new random decoder of a family of FAMILIES, in eval mode, float32.

    The weights are spread widely, so that a greedy choice is seldom a near tie.
    """

    def make(family: str, seed: int = 0, **overrides: object) -> PreTrainedModel:
        name, sizes = FAMILIES[family]
        shared = {
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 2048,
            "initializer_range": 0.2,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        config_name = "Gemma3TextConfig" if family == "gemma3" else f"{name}Config"
        config = getattr(transformers, config_name)(**{**shared, **sizes, **overrides})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model_class = "GPT2LMHeadModel" if family == "gpt2" else f"{name}ForCausalLM"
            return getattr(transformers, model_class)(config).eval()

    return make


@pytest.fixture(scope="session")
def llm_dir(
    tmp_path_factory: pytest.TempPathFactory,
    make_llm: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
) -> Path:
    """A directory with a tiny Llama and the tokenizer, as ``pretrained=`` wants it."""
    directory = tmp_path_factory.mktemp("llm")
    make_llm("llama").save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def in_two_processes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Callable[[], Any]], list[Any]]:
    """``in_two_processes(work)``: what ``work`` returns (JSON) in each rank of two that ``accelerate launch`` starts.

    On CPU over gloo, and forked with the environment that the launcher sets: starting Python anew would cost most of
    a minute.
    """

    def start(work: Callable[[], Any]) -> list[Any]:
        directory = tmp_path_factory.mktemp("ranks")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])

        def run(rank: int) -> None:
            os.environ.update(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE="2",
                LOCAL_WORLD_SIZE="2",
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
                ACCELERATE_USE_CPU="true",
            )
            AcceleratorState._reset_state(reset_partial_state=True)
            try:
                result = {"result": work()}
            except BaseException:
                result = {"error": traceback.format_exc()}
            (directory / f"{rank}.json").write_text(json.dumps(result))

        fork = multiprocessing.get_context("fork")
        processes = [fork.Process(target=run, args=(rank,)) for rank in range(2)]
        for process in processes:
            process.start()
        try:
            for process in processes:
                process.join(300)
        finally:
            for process in processes:
                process.kill()
        files = [directory / f"{rank}.json" for rank in range(2)]
        results = [json.loads(file.read_text()) if file.exists() else {"error": "no answer in time"} for file in files]
        errors = [result["error"] for result in results if "error" in result]
        assert not errors, "\n".join(errors)
        return [result["result"] for result in results]

    return start


def _one_expert(expert: Experts, x: torch.Tensor) -> torch.Tensor:
    x = x.double()
    if isinstance(expert, DenseExperts):
        w1, w2, w3, w4 = (weight.double() for weight in expert.weights)
        return w4 @ (w3 @ torch.relu(w2 @ (w1 @ x)))
    assert isinstance(expert, FactoredExperts)
    read_up, write_up, read_down, write_down = (factor.double() for factor in expert.factors)
    hidden = torch.relu(write_up @ (expert.core_up.double() @ (read_up @ x)))
    return write_down @ (expert.core_down.double() @ (read_down @ hidden))


@pytest.fixture(scope="session")
def one_expert() -> Callable[[Experts, torch.Tensor], torch.Tensor]:
    """``one_expert(expert, x)``: what one expert makes of one vector ``[d]``, by DESIGN's formulas, in float64."""
    return _one_expert
