"""Generated experts inside vLLM: a model of every supported family, and an engine that brings experts to requests."""
