"""What lm-eval sees: the model classes, their arguments, and what they do before and after the LLM."""
