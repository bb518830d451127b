"""Dense retrieval: bi-encoders, the passage index on disk, and the retriever that combines them."""
