"""A synthetic corpus of embeddings of any size, from a seed: clustered, and not easy to search.

    latent = sqrt(0.6) * centre + sqrt(0.4) * noise          [100], both standard normal
    vector = unit(tanh(2 * latent @ mix) @ spread) * norm    [768], norm = 1 + 0.05 * normal

``mix`` [100, 1024] and ``spread`` [1024, 768] are random and fixed, so the vectors lie on a curved surface of 100
dimensions: the first 100 principal components have 88 % of the variance, the first 300 have 96 %, and the participation
ratio of the covariance, (sum of eigenvalues)^2 / (sum of their squares), is 106. There is one centre per 50 vectors.
The probability of a centre falls with the square root of its number, so neighbours are often in other clusters, and
inverted lists do not coincide with clusters. Queries are sampled in the same way and are not copies of vectors. A block
depends only on the seed and its number.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from genpoe_plugin.data.passages import Passage
from genpoe_plugin.indexing.shards import Shards
from genpoe_plugin.retrieval.encoder_options import EncoderOptions

DIMENSION, LATENT, HIDDEN = 768, 100, 1024
CLUSTER = 50  # vectors, on average
BLOCK = 2**13  # vectors sampled at a time
WORDS = "a passage of Wikipedia has a hundred words, and so has what stands in its place " * 7


class ClusteredVectors:
    """``count`` vectors and any number of queries; see the module docstring."""

    def __init__(self, count: int, seed: int = 0) -> None:
        self.count, self.seed = count, seed
        rng = np.random.default_rng([seed, 0])
        self._mix = rng.standard_normal((LATENT, HIDDEN), np.float32) * np.float32(2 / LATENT**0.5)
        self._spread = rng.standard_normal((HIDDEN, DIMENSION), np.float32)
        self._centres = rng.standard_normal((max(1, count // CLUSTER), LATENT), np.float32)
        weights = np.arange(1, len(self._centres) + 1) ** -0.5
        self._probabilities = weights / weights.sum()

    def vectors(self, start: int, stop: int) -> np.ndarray:
        """Rows ``start`` to ``stop``, float32 [stop - start, 768].

        Raises:
            ValueError: ``start`` is not the first row of a block.
        """
        if start % BLOCK:
            raise ValueError(f"row {start} is not the first of a block of {BLOCK}")
        blocks = [self._draw(1, first // BLOCK)[: stop - first] for first in range(start, stop, BLOCK)]
        return np.concatenate(blocks)

    def queries(self, count: int, part: int = 0) -> np.ndarray:
        """Queries, float32 [count, 768], with ``count`` of at most `BLOCK`; each ``part`` has other queries."""
        return self._draw(2, part)[:count]

    def _draw(self, kind: int, number: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, kind, number])
        clusters = rng.choice(len(self._centres), BLOCK, p=self._probabilities)
        noise = rng.standard_normal((BLOCK, LATENT), np.float32)
        latent = np.float32(0.6**0.5) * self._centres[clusters] + np.float32(0.4**0.5) * noise
        vectors = np.tanh(latent @ self._mix) @ self._spread
        norms = 1 + np.float32(0.05) * rng.standard_normal((BLOCK, 1), np.float32)
        return vectors * (norms / np.linalg.norm(vectors, axis=1, keepdims=True))


class NumberedQuestions:
    """An encoder stand-in: question "7" is encoded as row 7 of ``queries``."""

    pooling, precision, dimension = "none", "float32", DIMENSION
    options = EncoderOptions("", "")

    def __init__(self, name: str, queries: np.ndarray) -> None:
        self.name = self.fingerprint = name
        self.questions = [str(number) for number in range(len(queries))]
        self._queries = queries

    def encode_questions(self, questions: Sequence[str]) -> np.ndarray:
        return self._queries[[int(question) for question in questions]]

    def encode_passages(self, passages: Sequence[Passage]) -> np.ndarray:
        raise NotImplementedError


def write_shards(vectors: ClusteredVectors, directory: Path) -> Shards:
    """Write the corpus as float16 shards, with passages of a hundred words. Existing shards are kept."""
    encoder = NumberedQuestions("clustered vectors", vectors.queries(1))
    shards = Shards.create(directory, encoder, count=vectors.count, digest=f"{vectors.count} {vectors.seed}")
    missing = set(shards.missing())
    start = 0
    for number in tqdm(shards.numbers, desc=f"{vectors.count:,} vectors", unit="shard"):
        stop = start + shards.rows(number)
        if number in missing:
            passages = [Passage(str(row), f"Title {row}", f"{row}: {WORDS}") for row in range(start, stop)]
            shards.write(number, passages, vectors.vectors(start, stop))
        start = stop
    return shards
