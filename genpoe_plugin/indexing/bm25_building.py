"""Build an index of BM25 from passages, in a directory beside the index that is renamed when it is complete."""

from __future__ import annotations

import json
import shutil
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice, pairwise
from pathlib import Path

import bm25s
import Stemmer
from bm25s.tokenization import Tokenized, Tokenizer
from tqdm import tqdm

from genpoe_plugin.data.passages import Passage, read_passages
from genpoe_plugin.errors import InputError
from genpoe_plugin.files import only_writer, replace_directory, writing
from genpoe_plugin.indexing.building import check_directory
from genpoe_plugin.indexing.corpus import check_corpus, source_of
from genpoe_plugin.indexing.passage_writing import write_passage_list
from genpoe_plugin.retrieval.bm25 import FILES, LANGUAGE, STOP_WORDS, BM25Retriever
from genpoe_plugin.retrieval.manifest import BM25, FORMAT, MANIFEST, VERSION, written_files
from genpoe_plugin.retrieval.passage_store import PASSAGES, PassageStore

NOT_SAVED = "nothing is saved; rerun the same command"
K1, B = 1.5, 0.75  # the defaults of bm25s


def build_bm25(
    passages: str | Path | Iterable[Passage],
    directory: str | Path,
    *,
    k1: float = K1,
    b: float = B,
    progress: bool = True,
) -> BM25Retriever:
    """Build an index of BM25; an existing index is replaced.

    An interrupted build starts over. Memory: about 25 bytes per pair of a passage and a word in it.

    Args:
        passages: a file for `read_passages`, or an iterable that can be read again, such as a list.
        directory: directory of the index.
        k1: how much repeated words count; with 0 they count once.
        b: how much longer passages are scored down, from 0 to 1.
        progress: whether to show progress bars.

    Returns:
        The opened index.

    Raises:
        InputError: the passages are malformed or have no words, their file changes meanwhile, ``directory`` holds
            something that is not an index, or the disk is full.
    """
    check_directory(directory)
    source = source_of(passages)
    corpus = check_corpus(passages, progress=progress)
    with only_writer(directory), _working_directory(Path(directory)) as work:
        with writing(work, NOT_SAVED):
            rows = read_passages(passages) if isinstance(passages, str | Path) else passages
            write_passage_list(islice(rows, corpus.count), corpus.count, work, progress=progress)
            if source_of(passages) != source:
                raise InputError(f"{passages}: changed during the build; start over")
            words = _Words(PassageStore.open(work), progress=progress)
            if not words.vocabulary:
                raise InputError("the passages have no words but stop words, so BM25 cannot find them")
            scores = bm25s.BM25(k1=k1, b=b, method="lucene", backend="numpy", csc_backend="scipy")
            scores.index(Tokenized(words, words.vocabulary), create_empty_token=False, show_progress=progress)
            scores.save(work, allow_pickle=False)
            manifest = {
                "format": FORMAT,
                "version": VERSION,
                "retriever": BM25,
                "k1": float(k1),
                "b": float(b),
                "count": corpus.count,
                "vocabulary": len(words.vocabulary),
                "digest": corpus.digest,
                "source": source,
                "files": written_files(work, [*FILES, PASSAGES]),
                "bm25s": bm25s.__version__,
            }
            (work / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        BM25Retriever.load(work)
        with writing(directory, NOT_SAVED):
            replace_directory(work, Path(directory))
    return BM25Retriever.load(directory)


def already_built(directory: str | Path, passages: Path, *, k1: float, b: float) -> bool:
    """Whether ``directory`` has an index of BM25 of the same file of passages, built with the same arguments."""
    try:
        manifest = BM25Retriever.load(directory).manifest
    except InputError:
        return False
    expected = {"source": source_of(passages), "k1": k1, "b": b, "bm25s": bm25s.__version__}
    return expected["source"] is not None and all(manifest[name] == value for name, value in expected.items())


class _Words:
    """The words of all passages, as numbers of the vocabulary, with 4 bytes per word.

    Args:
        passages: the passages.
        progress: whether to show a progress bar.
    """

    def __init__(self, passages: PassageStore, progress: bool) -> None:
        tokenizer = Tokenizer(stopwords=STOP_WORDS, stemmer=Stemmer.Stemmer(LANGUAGE))
        self._numbers, self._ends = array("i"), array("q", [0])
        rows = tqdm(range(len(passages)), desc="finding words", unit="passage", disable=not progress)
        strings = (passages.passage(row).string for row in rows)
        for words in tokenizer.streaming_tokenize(strings, update_vocab=True, allow_empty=False):
            self._numbers.extend(words)
            self._ends.append(len(self._numbers))
        self.vocabulary: dict[str, int] = tokenizer.get_vocab_dict()

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __iter__(self) -> Iterator[list[int]]:
        return (self._numbers[start:end].tolist() for start, end in pairwise(self._ends))


@contextmanager
def _working_directory(directory: Path) -> Iterator[Path]:
    """An empty directory beside ``directory``, deleted at the end of the block."""
    directory = directory.resolve()
    work = directory.with_name(f"{directory.name}.building-bm25")
    try:
        with writing(work, NOT_SAVED):
            shutil.rmtree(work, ignore_errors=True)  # of a killed process
            work.mkdir(parents=True)
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
