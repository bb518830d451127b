"""Damage a file: its bytes, or the values of the JSON or YAML in it. The seed decides everything."""

from __future__ import annotations

import gzip
import json
import random
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

DEPTH = 2000  # more than Python's JSON and YAML readers accept
VALUES = (
    *("null", "true", "false", "0", "-1", "1", "2", "0.5", "7.0", "1e400", "-1e400", "NaN", "-Infinity", "1e-320"),
    *("4294967296", "9223372036854775807", "18446744073709551616", "9" * 300, "9" * 5000),
    *('""', '" "', '"0"', '"nan"', '"\\ud800"', '"\\u0000"', '"\\u001b[2J\\r\\n"', '"\\u202e"', '"\U0001f600"'),
    *('".."', '"../../etc/passwd"', '"/etc/passwd"', '"a,b=c"', '"</script><script>"', '"$(id); `id` \'\\""'),
    *("[]", "{}", "[[]]", "[null]", "[1, 2, 3]", '{"a": 1}', '{"a": {"b": []}, "a": 2}', '{"": ""}', '[{"text": 1}]'),
    *("[" * DEPTH + "]" * DEPTH, "[" * DEPTH, '{"a":' * DEPTH + "1" + "}" * DEPTH, json.dumps("long " * 20_000)),
)
"""JSON texts that are put in the place of a value."""
YAML_VALUES = (
    *("!!python/object/apply:os.system [id]", "!!binary '*'", "!x 1", "2001-99-99", "0b", "1:1:1", ".nan", "-.inf"),
    *("&a [*a]", "&a {a: *a}", "*missing", "{[1]: 2}", "{<<: 3}", "|", "'", "\t", "? a", "0o9", "1_000", "=", "~"),
    f"[{', '.join(['&a0 [1, 1]', *(f'&a{n} [*a{n - 1}, *a{n - 1}]' for n in range(1, 40))])}]",
)
"""YAML texts that are put in the place of a value; the last one would have 2^40 items if its aliases were copied."""
NUMBERS = (0, 1, -1, 2**7, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, -(2**63), -(2**31))
"""Numbers that are written over bytes: sizes, offsets, dimensions."""
LINES = (".jsonl", ".part")
_MARK = "\ue000"  # stands for a text of VALUES while the values around it are written


def mutate(path: Path, rng: random.Random, others: list[Path]) -> None:
    """Damage a file in one to three places.

    Args:
        path: the file.
        rng: decides how.
        others: files whose content may take the place of the file's.
    """
    content = path.read_bytes()
    packed = path.suffix == ".gz" and rng.random() < 0.8
    name = path.with_suffix("").name if packed else path.name
    content = gzip.decompress(content) if packed else content
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        change = _values(Path(name).suffix) if rng.random() < 0.65 else None
        try:
            content = _bytes(content, rng, others) if change is None else change(content, rng)
        except Exception:  # damaged by an earlier change, so that it has no values any more
            content = _bytes(content, rng, others)
    path.write_bytes(gzip.compress(content, 1) if packed else content)


def _bytes(content: bytes, rng: random.Random, others: list[Path]) -> bytes:
    data = bytearray(content)
    at = rng.randrange(len(data) + 1)
    length = rng.choice((1, 4, 8, 64, len(data)))
    match rng.randrange(9):
        case 0:
            return content[:at]
        case 1:
            return rng.choice(others).read_bytes() if others else b""
        case 2:
            return b"" if rng.random() < 0.2 else content[at:]
        case 3:  # the same piece again
            return bytes(data[: at + length] + data[at:])
        case 4:
            return bytes(data[:at] + rng.randbytes(rng.choice((1, 2, 16, 300))) + data[at:])
        case 5:
            del data[at : at + length]
        case 6 if data:
            for _ in range(rng.choice((1, 3, 20))):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        case 7:  # a number of 4 or 8 bytes; headers are at the beginning or at the end
            width = rng.choice((4, 8))
            number = rng.choice(NUMBERS) % 2 ** (8 * width)
            at = rng.choice((at, rng.randrange(200), max(0, len(data) - rng.randrange(1, 600))))
            data[at : at + width] = number.to_bytes(width, "little")
        case _:
            piece = rng.choice((b"\0", b"\xff\xfe", b"\x80", b"\n", b'"', b"\t", b"{", b"[", b",", b"\xed\xa0\x80"))
            data[at:at] = piece * rng.choice((1, 1, DEPTH))
    return bytes(data)


Change = Callable[[bytes, random.Random], bytes]


def _values(suffix: str) -> Change | None:
    """The function that changes a value in files of this type; None if they have no values."""
    if suffix == ".safetensors":
        return _in_header
    if suffix in (".yaml", ".yml"):
        return _in_yaml
    if suffix in LINES:
        return _in_a_line
    return (lambda content, rng: _changed(json.loads(content), rng).encode()) if suffix == ".json" else None


def _in_yaml(content: bytes, rng: random.Random) -> bytes:
    if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(content)):
        # An earlier change may have put aliases of aliases there, which would be written out.
        raise ValueError("aliases")
    return _changed(yaml.safe_load(content), rng, VALUES + YAML_VALUES).encode()


def _in_a_line(content: bytes, rng: random.Random) -> bytes:
    lines = content.splitlines(keepends=True)
    number = rng.randrange(len(lines)) if lines else 0
    return b"".join([*lines[:number], _changed(json.loads(lines[number]), rng).encode(), b"\n", *lines[number + 1 :]])


def _in_header(content: bytes, rng: random.Random) -> bytes:
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    if rng.random() < 0.3:
        # What the file says of itself is JSON in a text.
        for name, text in header.get("__metadata__", {}).items():
            header["__metadata__"][name] = _changed(json.loads(text), rng)
        changed = json.dumps(header).encode()
    else:
        changed = _changed(header, rng).encode()
    return struct.pack("<Q", len(changed)) + changed + content[8 + length :]


def _changed(value: Any, rng: random.Random, texts: Sequence[str] = VALUES) -> str:
    """The JSON text of a value after a change in one place, where one of ``texts`` may be put."""
    places = list(_places(value))
    if not places:
        return rng.choice(texts)
    holder, key = rng.choice(places)
    match rng.randrange(8):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):  # the same name twice, and other names
            holder[rng.choice((_MARK * 2, "", "\ud800", "a" * 10_000))] = holder[key]
        case 2:
            other, name = rng.choice(places)
            holder[key] = json.loads(json.dumps(other[name]))
        case 3:
            holder[key] = rng.choice((str, lambda old: [old], lambda old: {"a": old}, lambda old: [old, old]))(
                holder[key]
            )
        case 4 if isinstance(holder, list):
            holder.insert(key, json.loads(json.dumps(holder[key])))
        case _:
            holder[key] = _MARK
    text = json.dumps(value).replace(json.dumps(_MARK), rng.choice(texts))
    if isinstance(holder, dict) and isinstance(key, str):
        text = text.replace(json.dumps(_MARK * 2), json.dumps(key))
    return text


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """All places in a value, each as a dictionary or list and a key in it."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from _places(inner)
