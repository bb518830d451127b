"""From a question to its gated passages: retrieved, reranked, or drawn as a control."""
