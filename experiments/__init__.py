"""Experiments and the making of files that come with the package; not part of it."""
