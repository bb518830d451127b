from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from genpoe_plugin.data.passages import Passage
from genpoe_plugin.errors import InputError
from genpoe_plugin.indexing.encoding import encode_shards
from genpoe_plugin.indexing.passage_writing import write_passages
from genpoe_plugin.retrieval.passage_store import BLOCK, PassageStore


@pytest.mark.parametrize("shard_size", [100, BLOCK, BLOCK + 1, 5000])
def test_rows(fixed_corpus: Callable[..., tuple], tmp_path: Path, shard_size: int) -> None:
    """Wherever shards end."""
    passages, encoder = fixed_corpus(np.zeros((2 * BLOCK + 30, 2)))
    passages[700] = Passage("p700", "", 'naïve 東京 "quoted"\nsecond line')
    shards = encode_shards(passages, encoder, tmp_path / "shards", shard_size=shard_size, progress=False)
    (tmp_path / "index").mkdir()
    write_passages(shards, tmp_path / "index")
    store = PassageStore.open(tmp_path / "index")
    assert [store.passage(row) for row in range(len(store))] == passages
    for row in (-1, len(passages)):
        with pytest.raises(IndexError):
            store.passage(row)


def test_a_damaged_shard_is_named(fixed_corpus: Callable[..., tuple], tmp_path: Path) -> None:
    passages, encoder = fixed_corpus(np.zeros((20, 2)))
    shards = encode_shards(passages, encoder, tmp_path / "shards", shard_size=10, progress=False)
    path = shards.passages_file(1)
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(InputError, match=r"shard-00001.arrow: cannot be read .*") as caught:
        write_passages(shards, tmp_path)
    assert "\n" not in str(caught.value) and not (tmp_path / "passages.arrow").exists()
