"""The model classes for lm-eval, with their arguments and their preparation of requests."""
