"""Training the two parts that are trained: the reranker and the hypernetwork."""
