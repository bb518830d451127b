"""The trained experts that the package brings: whole, small, and without a trace of where they were made."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

import genpoe_plugin.demo
from genpoe_plugin.checkpoints.checkpoint import read_config, read_record
from genpoe_plugin.experts.hypernetwork import Hypernetwork

FOLDER = Path(genpoe_plugin.demo.__file__).parent / "assets" / "qwen2.5-coder-0.5b-experts"


def test_weights_are_those_of_the_configuration():
    config = read_config(FOLDER)
    weights = load_file(FOLDER / "model.safetensors")
    Hypernetwork(config).load_state_dict(weights)  # which refuses missing, further and misshapen ones
    assert (config.layers, config.window, config.layout) == ((11, 16, 21, 22), 4, "paragraph")
    assert all(weight.isfinite().all() for weight in weights.values())
    assert weights["head.query_write"].abs().max() > 0 and weights["head.adders.3.write"].abs().max() > 0
    record = read_record(FOLDER)["training"]["arguments"]
    assert (record["unanswerable"], record["num_passages"]) == (0.25, 4)


def test_it_is_small_and_names_no_directory_of_anyone():
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 4_000_000
    for name in ("config.json", "README.md"):
        text = (FOLDER / name).read_text()
        assert not any(folder in text for folder in ("/tmp/", "/home/", "/work/", "/root/"))
    for said in ("license: apache-2.0", "base_model: Qwen/", "CC BY-SA 3.0", "CC BY-SA 4.0", "passages=shuffled"):
        assert said in (FOLDER / "README.md").read_text()
