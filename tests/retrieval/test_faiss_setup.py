from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Stands in for the library, to see the environment that it would be loaded in.
STUB = "import os, types\nkernel = os.environ.get('OPENBLAS_CORETYPE')\ncvar = types.SimpleNamespace()\n"
SCRIPT = """
import os, pathlib, sys
if sys.argv[1]:
    pathlib.Path.read_text = lambda self: "processor : 0\\nflags : fpu " + sys.argv[1] + "\\n"
from genpoe_plugin.retrieval.faiss_setup import faiss
print(faiss.kernel, os.environ.get("OPENBLAS_CORETYPE"), faiss.cvar.distance_compute_blas_threshold)
"""


@pytest.mark.parametrize(
    ("flags", "own", "printed"),
    [
        ("avx512f avx512dq avx512bw avx512vl", {}, "SkylakeX None 20"),
        ("avx512f avx512dq avx512bw", {}, "None None 20"),
        ("avx512f avx512dq avx512bw avx512vl", {"OPENBLAS_CORETYPE": "Haswell"}, "Haswell Haswell 20"),
    ],
)
def test_kernel_is_chosen_while_faiss_loads(tmp_path: Path, flags: str, own: dict[str, str], printed: str) -> None:
    (tmp_path / "faiss.py").write_text(STUB)
    environment = {name: value for name, value in os.environ.items() if name != "OPENBLAS_CORETYPE"}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, flags], env=environment | own, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == printed


def test_threshold_is_set_in_the_real_library() -> None:
    from genpoe_plugin.retrieval.faiss_setup import faiss

    assert faiss.cvar.distance_compute_blas_threshold == 20
