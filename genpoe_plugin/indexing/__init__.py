"""What is made ahead of retrieval: encoded passages in shards, and the index that is built from them."""
