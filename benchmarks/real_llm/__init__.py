"""What experts do in real, pretrained LLMs: `python -m benchmarks real-llm`."""
