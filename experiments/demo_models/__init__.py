"""The LLM and the encoder of the demo's world, which are trained once and come with the package."""
