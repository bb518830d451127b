"""Selection: choose the passages of each question (by retrieval, reranking or a control) and their gates."""
