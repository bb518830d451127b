"""The stock command, and vLLM as it comes: in processes of its own, and with our models known to it by name only."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from tests.lm.vllm.conftest import SMALL


def test_lm_eval(llm_dir, hypernetwork_dir, docs_file, docs, make_lm, generation, tmp_path):
    options = {"max_num_seqs": 4, "max_loras": 2, "max_cpu_loras": 3}
    options |= {name: SMALL[name] for name in ("dtype", "enforce_eager", "max_model_len", "kv_cache_memory_bytes")}
    arguments = {"pretrained": llm_dir, "mode": "genpoe_rag", "hypernetwork": hypernetwork_dir, **options}
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "lm_eval", "--model", "genpoe-vllm", "--tasks", "genpoe_demo", "--log_samples"),
            *("--model_args", ",".join(f"{name}={value}" for name, value in arguments.items())),
            *("--gen_kwargs", "max_gen_toks=6", "--metadata", json.dumps({"genpoe_data": str(docs_file)})),
            *("--output_path", str(tmp_path)),
        ],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = tmp_path.glob("*/samples_genpoe_demo_*.jsonl")
    samples = sorted(map(json.loads, file.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    expected = make_lm("genpoe_rag", max_length=512).generate_until(generation(docs, max_gen_toks=6))
    # Of a character whose last bytes are missing, vLLM says nothing.
    found = [sample["resps"][0][0].rstrip("\ufffd") for sample in samples]
    assert found == [answer.rstrip("\ufffd") for answer in expected]
    (results,) = tmp_path.glob("*/results_*.json")
    content = json.loads(results.read_text())
    assert content["config"]["genpoe"]["arguments"]["mode"] == "genpoe_rag"
