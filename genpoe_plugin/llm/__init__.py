"""The frozen LLM: loading it, and GGUF files."""
