"""The trained experts that the package brings: whole, small, and without a trace of where they were made."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

import genpoe_plugin.demo
from genpoe_plugin.checkpoints.checkpoint import read_config, read_record
from genpoe_plugin.experts.hypernetwork import Hypernetwork

ASSETS = Path(genpoe_plugin.demo.__file__).parent / "assets"
QWEN, SMOLLM2 = ASSETS / "qwen2.5-coder-0.5b-experts", ASSETS / "smollm2-135m-experts"
UNANSWERABLE, BYTES = {QWEN: 0.25, SMOLLM2: 0.0}, {QWEN: 4_000_000, SMOLLM2: 6_000_000}
LAYERS = {QWEN: (11, 16, 21, 22), SMOLLM2: (12, 14, 16, 17, 18, 20, 21, 22, 23, 25)}


@pytest.mark.parametrize("folder", LAYERS, ids=lambda folder: folder.name)
def test_weights_are_those_of_the_configuration(folder):
    config = read_config(folder)
    weights = load_file(folder / "model.safetensors")
    Hypernetwork(config).load_state_dict(weights)  # which refuses missing, further and misshapen ones
    assert (config.layers, config.window, config.layout) == (LAYERS[folder], 4, "paragraph")
    assert all(weight.isfinite().all() for weight in weights.values())
    assert weights["head.query_write"].abs().max() > 0 and weights["head.adders.3.write"].abs().max() > 0
    record = read_record(folder)["training"]["arguments"]
    assert (record["unanswerable"], record["num_passages"]) == (UNANSWERABLE[folder], 4)


@pytest.mark.parametrize("folder", LAYERS, ids=lambda folder: folder.name)
def test_it_is_small_and_names_no_directory_of_anyone(folder):
    assert sum(file.stat().st_size for file in folder.iterdir()) < BYTES[folder]
    for name in ("config.json", "README.md"):
        text = (folder / name).read_text()
        assert not any(folder in text for folder in ("/tmp/", "/home/", "/work/", "/root/"))
    base = {QWEN: "Qwen/", SMOLLM2: "HuggingFaceTB/"}[folder]
    for said in ("license: apache-2.0", f"base_model: {base}", "CC BY-SA 3.0", "CC BY-SA 4.0", "shuffled"):
        assert said in (folder / "README.md").read_text()
