"""Indexing: encode passages into shards, and build an index from the shards."""
