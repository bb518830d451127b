"""Side-by-side measurements: ratios taken within one process, against named alternatives."""
