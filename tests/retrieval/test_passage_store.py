from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from genpoe_plugin.data.passages import Passage
from genpoe_plugin.errors import InputError
from genpoe_plugin.indexing import passage_writing
from genpoe_plugin.indexing.encoding import encode_shards
from genpoe_plugin.indexing.passage_writing import write_passages
from genpoe_plugin.retrieval import passage_store
from genpoe_plugin.retrieval.passage_store import BLOCK, PassageStore


@pytest.mark.parametrize("shard_size", [100, BLOCK, BLOCK + 1, 5000])
def test_rows_and_ids(fixed_corpus: Callable[..., tuple], tmp_path: Path, shard_size: int) -> None:
    """Wherever shards end."""
    passages, encoder = fixed_corpus(np.zeros((2 * BLOCK + 30, 2)))
    passages[700] = Passage("p700", "", 'naïve 東京 "quoted"\nsecond line')
    shards = encode_shards(passages, encoder, tmp_path / "shards", shard_size=shard_size, progress=False)
    (tmp_path / "index").mkdir()
    write_passages(shards, tmp_path / "index")
    store = PassageStore.open(tmp_path / "index")
    assert [store.passage(row) for row in range(len(store))] == passages
    assert [store.row(passage.id) for passage in passages] == list(range(len(passages)))
    for row in (-1, len(passages)):
        with pytest.raises(IndexError):
            store.passage(row)
    for identifier in ("", "p", "P1"):
        with pytest.raises(KeyError):
            store.row(identifier)


def test_ids_of_one_hash_are_told_apart(
    fixed_corpus: Callable[..., tuple], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (passage_store, passage_writing):
        monkeypatch.setattr(module, "hash_id", lambda identifier: len(identifier))
    passages, encoder = fixed_corpus(np.zeros((120, 2)))
    shards = encode_shards(passages, encoder, tmp_path / "shards", progress=False)
    write_passages(shards, tmp_path)
    store = PassageStore.open(tmp_path)
    assert [store.row(passage.id) for passage in passages] == list(range(120))
    with pytest.raises(KeyError):
        store.row("x9")


def test_a_damaged_shard_is_named(fixed_corpus: Callable[..., tuple], tmp_path: Path) -> None:
    passages, encoder = fixed_corpus(np.zeros((20, 2)))
    shards = encode_shards(passages, encoder, tmp_path / "shards", shard_size=10, progress=False)
    path = shards.passages_file(1)
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(InputError, match=r"shard-00001.arrow: cannot be read .*") as caught:
        write_passages(shards, tmp_path)
    assert "\n" not in str(caught.value) and not (tmp_path / "passages.arrow").exists()
