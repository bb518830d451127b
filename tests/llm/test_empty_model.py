"""An LLM without its weights, against the same with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from genpoe_plugin.errors import InputError
from genpoe_plugin.llm.empty_model import empty_model, weight_bytes

MakeLLM = Callable[..., PreTrainedModel]


def change_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}), encoding="utf-8")


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gpt_neox", "gpt2"])
def test_shapes_are_those_of_the_loaded_model(make_llm: MakeLLM, tmp_path: Path, family: str) -> None:
    model = make_llm(family)
    model.save_pretrained(tmp_path)
    for weights in tmp_path.glob("*.safetensors"):
        weights.unlink()
    empty = empty_model(str(tmp_path))
    shapes = {name: (weight.shape, weight.dtype) for name, weight in empty.named_parameters()}
    assert shapes == {name: (weight.shape, weight.dtype) for name, weight in model.named_parameters()}
    assert weight_bytes(str(tmp_path), empty) == sum(weight.nbytes for weight in model.parameters())


def test_nothing_has_storage(llm_dir: Path) -> None:
    model = empty_model(str(llm_dir))
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}


@pytest.mark.parametrize(
    ("configured", "dtype", "number_bytes"),
    [("bfloat16", "auto", 2), ("float32", "auto", 4), ("float32", "bfloat16", 2), ("bfloat16", "float32", 4)],
)
def test_dtypes(make_llm: MakeLLM, tmp_path: Path, configured: str, dtype: str, number_bytes: int) -> None:
    make_llm("llama").config.save_pretrained(tmp_path)
    change_config(tmp_path, dtype=configured)
    empty = empty_model(str(tmp_path), dtype=dtype)
    assert {weight.dtype.itemsize for weight in empty.parameters()} == {number_bytes}
    assert weight_bytes(str(tmp_path), empty) == number_bytes * empty.num_parameters()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_configuration_without_dtype_has_that_of_its_files(
    make_llm: MakeLLM, tmp_path: Path, dtype: torch.dtype
) -> None:
    make_llm("llama").to(dtype).save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    change_config(tmp_path, dtype=None)
    assert empty_model(str(tmp_path)).dtype == dtype


def test_a_quantised_llm_takes_what_its_files_hold(make_llm: MakeLLM, tmp_path: Path) -> None:
    make_llm("llama").config.save_pretrained(tmp_path)
    change_config(tmp_path, dtype="float16", quantization_config={"quant_method": "gptq", "bits": 4})
    packed = {"a.qweight": torch.zeros(7, 5, dtype=torch.int32), "a.scales": torch.zeros(3, dtype=torch.float16)}
    save_file(packed, tmp_path / "model.safetensors")
    empty = empty_model(str(tmp_path))
    assert weight_bytes(str(tmp_path), empty) == 7 * 5 * 4 + 3 * 2
    assert empty.dtype == torch.float16


@pytest.mark.parametrize("content", [None, "{}", "{", '{"model_type": "clip"}'])
def test_what_is_no_llm_is_said_in_one_line(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match="cannot be loaded") as error:
        empty_model(str(tmp_path))
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_dtype(llm_dir: Path) -> None:
    with pytest.raises(InputError, match="dtype float23: no such dtype"):
        empty_model(str(llm_dir), dtype="float23")
