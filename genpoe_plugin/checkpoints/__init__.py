"""Checkpoints of hypernetworks: load, save, push, and the model card."""
