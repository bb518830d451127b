"""Retrieval: the passage index on disk, bi-encoders, and dense, BM25 and hybrid retrievers."""
