"""Benchmarks against named baselines, as ratios measured within one process."""
