"""``genpoe index``: encoding passages, and building, tuning and describing their index."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from genpoe_plugin.indexing.building import Queries
    from genpoe_plugin.indexing.shards import Shards
    from genpoe_plugin.retrieval.encoder import Encoder
    from genpoe_plugin.retrieval.index import PassageIndex

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
PASSAGES = "TSV, JSON lines or DPR results; .gz."
ENCODER = "sentence-transformers model, or a DPR pair as QUESTION_ENCODER,CONTEXT_ENCODER; directories or hub names."
QUESTIONS = "DPR results or qas, nq_open; .gz"

Command = TypeVar("Command", bound=Callable[..., Any])


class Size(click.ParamType):
    """Bytes, as ``16GB`` or ``16GiB``."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(value).strip()):
            number, unit = match.groups()
            if (scale := UNITS.get(unit.upper())) is not None:
                return int(float(number) * scale)
        self.fail(f"{value!r} is not a size such as 16GB", param, ctx)


def with_encoding(command: Command) -> Command:
    """Add the options that say how passages are encoded."""
    for option in (
        click.option(
            "--shard-size", default=2**16, show_default=True, type=click.IntRange(1), help="Passages per shard."
        ),
        click.option(
            "--store",
            default="float16",
            show_default=True,
            type=click.Choice(["float16", "float32"]),
            help="Precision of the vectors in the shards.",
        ),
        click.option(
            "--dtype",
            default="float32",
            show_default=True,
            type=click.Choice(["float32", "float16", "bfloat16"]),
            help="Precision of the encoder; half precision is for GPUs.",
        ),
        click.option("--device", default="cpu", show_default=True),
        click.option(
            "--batch-size", default=64, show_default=True, type=click.IntRange(1), help="Passages per encoding batch."
        ),
    ):
        command = option(command)
    return command


def with_tuning(command: Command) -> Command:
    """Add the options that say how thorough an approximate index is."""
    for option in (
        click.option(
            "--queries",
            type=click.Path(path_type=Path),
            help=f"Questions to measure recall with ({QUESTIONS}); without it, perturbed passages.",
        ),
        click.option(
            "--recall",
            default=0.95,
            show_default=True,
            type=click.FloatRange(0, 1, min_open=True),
            help="Recall@20 against exact search that an approximate index has to reach.",
        ),
    ):
        command = option(command)
    return command


@click.group()
def index() -> None:
    """Encode passages, and build, tune or describe their index."""


@index.command()
@click.option("--passages", required=True, type=click.Path(path_type=Path), help=PASSAGES)
@click.option("--encoder", required=True, help=ENCODER)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for the shards.")
@with_encoding
def encode(
    passages: Path, encoder: str, out: Path, batch_size: int, device: str, dtype: str, store: str, shard_size: int
) -> None:
    """Encode PASSAGES into a folder of shards, from which any number of indexes is built.

    As `accelerate launch -m train_cli index encode ...`, on one machine or many that see the folder, every shard is
    encoded by one process. Rerun the same command to resume.
    """
    from genpoe_plugin.indexing.encoding import encode_shards
    from genpoe_plugin.retrieval.encoder import load_encoder

    model = load_encoder(encoder, device=_own(device), batch_size=batch_size, dtype=dtype)
    shards = encode_shards(passages, model, out, shard_size=shard_size, dtype=store)
    if _place().rank == 0:
        click.echo(f"{out}: {shards.count:,} passages, {shards.dimension} dimensions, {len(shards):,} shards")


@index.command()
@click.option("--passages", type=click.Path(path_type=Path), help=f"{PASSAGES} Not needed where all are in --shards.")
@click.option("--encoder", help=ENCODER)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Directory for the index.")
@click.option(
    "--shards",
    "folder",
    type=click.Path(path_type=Path),
    help="Folder of `genpoe index encode`, or one to make and keep.  [default: one that goes when the index is there]",
)
@click.option("--factory", help="FAISS factory string; Flat is exact search.  [default: by size and memory]")
@click.option("--memory", type=Size(), help="Memory limit of the build, such as 16GB.  [default: what is free]")
@with_tuning
@with_encoding
def build(
    passages: Path | None,
    encoder: str | None,
    out: Path,
    folder: Path | None,
    factory: str | None,
    memory: int | None,
    recall: float,
    queries: Path | None,
    batch_size: int,
    device: str,
    dtype: str,
    store: str,
    shard_size: int,
) -> None:
    """Build a search index from PASSAGES or from SHARDS. Rerun the same command to resume."""
    from genpoe_plugin.errors import InputError
    from genpoe_plugin.indexing.building import already_built, build_index, check_directory, shards_directory
    from genpoe_plugin.indexing.shards import Shards
    from genpoe_plugin.retrieval.faiss_setup import make_index

    check_directory(out)
    asked: dict[str, Any] = {"factory": factory, "memory": memory, "recall": recall}
    model = None
    if passages is not None:
        from genpoe_plugin.indexing.encoding import encode_shards
        from genpoe_plugin.retrieval.encoder import load_encoder

        if encoder is None:
            raise InputError("--passages needs --encoder, the model to encode them with")
        model = load_encoder(encoder, device=_own(device), batch_size=batch_size, dtype=dtype)
        if factory is not None:
            make_index(factory, model.dimension)  # before the long work
        if already_built(out, passages, model, **asked, queries=queries):
            click.echo(f"{out}: built already, of the same passages and in the same way")
            return
        with shards_directory(out, folder) as target:
            shards = encode_shards(passages, model, target, shard_size=shard_size, dtype=store)
        if _place().rank != 0:
            return
    elif folder is not None:
        shards = Shards.open(folder)
    else:
        raise InputError("give --passages and --encoder, or --shards with what `genpoe index encode` made of them")
    tuned_by = None if queries is None else _encode_questions(queries, shards, encoder, model, device)
    del model  # before the memory is needed
    built = build_index(shards, out, **asked, queries=tuned_by)
    click.echo(
        f"{out}: {len(built):,} passages, {built.dimension} dimensions, {built.manifest['factory']}{_recall(built)}"
    )


@index.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--shards", "folder", required=True, type=click.Path(path_type=Path), help="What the index was built from."
)
@with_tuning
@click.option("--encoder", help="Encoder of the index, if its path has changed.")
@click.option("--device", default="cpu", show_default=True)
def tune(directory: Path, folder: Path, recall: float, queries: Path | None, encoder: str | None, device: str) -> None:
    """Tune the search parameters of the index in DIRECTORY again."""
    from genpoe_plugin.indexing.building import retune
    from genpoe_plugin.indexing.shards import Shards
    from genpoe_plugin.retrieval.index import PassageIndex

    opened, shards = PassageIndex.load(directory), Shards.open(folder)
    tuned_by = None if queries is None else _encode_questions(queries, shards, encoder, None, device)
    click.echo(f"{directory}: {opened.manifest['factory']}{_recall(retune(opened, shards, recall, tuned_by))}")


@index.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--verify", is_flag=True, help="Read every byte and compare checksums.")
def info(directory: Path, verify: bool) -> None:
    """Describe the index in DIRECTORY."""
    from genpoe_plugin.retrieval.index import PassageIndex

    opened = PassageIndex.load(directory)
    if verify:
        opened.verify()
    search = opened.manifest["search"]
    parameters = ", ".join(f"{name} {value:g}" for name, value in search["parameters"].items())
    click.echo(f"passages     {len(opened):,}")
    click.echo(f"dimensions   {opened.dimension}")
    click.echo(f"factory      {opened.manifest['factory']}")
    click.echo(f"search       {parameters or 'nothing to set'}{_recall(opened)}")
    click.echo(f"measured by  {search['queries']}")
    click.echo(f"encoder      {opened.encoder_name}")
    click.echo(f"pooling      {opened.manifest['pooling']}")
    click.echo(f"fingerprint  {opened.encoder_fingerprint}")
    for name, file in opened.manifest["files"].items():
        click.echo(f"{name:<16} {file['bytes']:,} bytes{', verified' if verify else ''}")


def _recall(index: PassageIndex) -> str:
    search = index.manifest["search"]
    return f", recall@{search['recall_at']} {search['recall']:.3f}" if "recall_at" in search else ""


def _encode_questions(path: Path, shards: Shards, name: str | None, model: Encoder | None, device: str) -> Queries:
    """Question vectors of the encoder that the shards were made with."""
    from genpoe_plugin.data.questions import read_questions
    from genpoe_plugin.errors import InputError
    from genpoe_plugin.indexing.building import Queries
    from genpoe_plugin.retrieval.encoder import load_encoder

    asked = [question.question for question in read_questions(path)]
    if not asked:
        raise InputError(f"{path}: no questions")
    model = model or load_encoder(name or shards.encoder_name, device=device)
    if model.fingerprint != shards.encoder_fingerprint:
        raise InputError(
            f"{shards.directory}: encoded with {shards.encoder_name} ({shards.encoder_fingerprint[:12]}), questions"
            f" with {model.name} ({model.fingerprint[:12]}); give that one"
        )
    return Queries(model.encode_questions(asked), str(path.resolve()))


def _place() -> Any:
    """Which of the processes of `accelerate launch` this is."""
    from accelerate.utils import get_cpu_distributed_information

    return get_cpu_distributed_information()


def _own(device: str) -> str:
    """This process's GPU, where `accelerate launch` started one for each."""
    place = _place()
    return f"cuda:{place.local_rank}" if device == "cuda" and place.local_world_size > 1 else device
