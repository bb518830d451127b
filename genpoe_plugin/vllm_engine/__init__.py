"""Generated experts on vLLM: a model class for every supported family, and an engine that serves requests."""
