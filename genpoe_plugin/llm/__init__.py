"""Load the frozen LLM, also from GGUF files."""
