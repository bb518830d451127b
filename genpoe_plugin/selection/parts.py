"""Reranking on several machines: each one reranks a part of the questions, and the parts are joined."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from genpoe_plugin.data.questions import Question, read_header, read_questions, write_questions
from genpoe_plugin.errors import InputError
from genpoe_plugin.files import only_writer
from genpoe_plugin.selection.result_files import score_blocks


@dataclass(frozen=True, order=True)
class Part:
    """Part ``number`` (from 1) of ``count`` parts of a file of questions."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """Read a part such as ``2/4``.

        Raises:
            ValueError: it is not a part.
        """
        number, _, count = text.partition("/")
        part = cls(int(number), int(count))
        if not 1 <= part.number <= part.count:
            raise ValueError(text)
        return part

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def questions(self, read: Callable[[], Iterator[Question]]) -> Iterator[Question]:
        """Yield the part's questions, which are consecutive.

        Parts begin at blocks of `score_blocks`, so that pairs of a batch, and with them the last digits of scores, are
        those of reranking all questions.

        Args:
            read: reads all questions from the beginning.

        Raises:
            InputError: there are fewer blocks than parts.
        """
        blocks = sum(1 for _ in score_blocks(read()))
        if blocks < self.count:
            raise InputError(f"--part {self}: too few passages for {self.count} parts; give at most {blocks}")
        first, last = (blocks * number // self.count for number in (self.number - 1, self.number))
        return chain.from_iterable(islice(score_blocks(read()), first, last))


def join_parts(paths: Sequence[Path], out: Path) -> int:
    """Join result files of all parts, in any order, to one file, as if there had been no parts.

    Returns:
        The number of questions.

    Raises:
        InputError: a file is not a part, one is missing or there twice, they belong to different runs, or ``out`` is
            one of them.
    """
    if out.exists() and any(path.exists() and path.samefile(out) for path in paths):
        raise InputError(f"{out}: one of the parts; give another --out")
    headers: dict[Part, dict[str, object]] = {}
    files: dict[Part, Path] = {}
    for path in paths:
        header = read_header(path)
        try:
            part = Part.parse(str(header.pop("part", "")))
        except ValueError:
            raise InputError(f"{path}: not a part; give files of `genpoe rerank --part`") from None
        if part in files:
            raise InputError(f"{path}: part {part} is also in {files[part]}; give each part once")
        headers[part], files[part] = header, path
    first = min(files)
    for part in sorted(files):
        if part.count != first.count or headers[part] != headers[first]:
            raise InputError(f"{files[part]}: a part of another run than {files[first]}")
    if len(files) < first.count:
        missing = next(number for number in range(1, first.count + 1) if Part(number, first.count) not in files)
        raise InputError(f"part {missing}/{first.count}: missing; give the files of all {first.count} parts")
    count = 0

    def questions() -> Iterator[Question]:
        nonlocal count
        for part in sorted(files):
            for question in read_questions(files[part], need_answers=False):
                count += 1
                yield question

    with only_writer(out):
        write_questions(out, questions(), **headers[first])
    return count
