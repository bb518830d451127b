"""``genpoe index``: encode passages, and build, tune or describe their index."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from genpoe_plugin.retrieval.manifest import BM25, DENSE

if TYPE_CHECKING:
    from genpoe_plugin.indexing.building import Queries
    from genpoe_plugin.indexing.shards import Shards
    from genpoe_plugin.retrieval.encoder import Encoder
    from genpoe_plugin.retrieval.index import PassageIndex

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
PASSAGES = "TSV, JSON lines or DPR results; .gz."
ENCODER = "sentence-transformers model, or a DPR pair as QUESTION_ENCODER,CONTEXT_ENCODER; directories or hub names."
QUESTIONS = "DPR results or qas, nq_open; .gz"
BM25_OPTIONS = ("k1", "b")
COMMON_OPTIONS = ("retriever", "passages", "out")

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
    """Add the options for encoding passages."""
    for option in (
        click.option(
            "--dimensions",
            type=click.IntRange(1),
            help="Keep only the first dimensions of a Matryoshka encoder's vectors.  [default: all]",
        ),
        click.option(
            "--passage-prompt",
            help="Text before every passage, '' for none.  [default: the encoder's own, or that of its family]",
        ),
        click.option(
            "--question-prompt",
            help="Text before every question, '' for none.  [default: the encoder's own, or that of its family]",
        ),
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
    """Add the options for tuning an approximate index to a recall target."""
    for option in (
        click.option(
            "--queries",
            type=click.Path(path_type=Path),
            help=f"Questions to measure recall with ({QUESTIONS}).  [default: perturbed passages]",
        ),
        click.option(
            "--recall",
            default=0.95,
            show_default=True,
            type=click.FloatRange(0, 1, min_open=True),
            help="Target recall@20 of an approximate index against exact search.",
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
    passages: Path,
    encoder: str,
    out: Path,
    batch_size: int,
    device: str,
    dtype: str,
    store: str,
    shard_size: int,
    question_prompt: str | None,
    passage_prompt: str | None,
    dimensions: int | None,
) -> None:
    """Encode PASSAGES into a folder of shards, from which any number of indexes can be built.

    Several processes share the work if they see the same folder, on one machine (`accelerate launch -m train_cli index
    encode ...`) or on many; each shard is encoded by one of them. Rerun the same command to resume.
    """
    from genpoe_plugin.indexing.encoding import encode_shards
    from genpoe_plugin.retrieval.encoder import load_encoder
    from genpoe_plugin.retrieval.encoder_options import EncoderOptions

    options = EncoderOptions(question_prompt, passage_prompt, dimensions)
    model = load_encoder(encoder, device=_process_device(device), batch_size=batch_size, dtype=dtype, options=options)
    shards = encode_shards(passages, model, out, shard_size=shard_size, dtype=store)
    if _process_info().rank == 0:
        click.echo(f"{out}: {shards.count:,} passages, {shards.dimension} dimensions, {len(shards):,} shards")


@index.command()
@click.option(
    "--retriever",
    default=DENSE,
    show_default=True,
    type=click.Choice([DENSE, BM25]),
    help="What the index is for: vectors of an encoder, or words.",
)
@click.option("--passages", type=click.Path(path_type=Path), help=f"{PASSAGES} Not needed if --shards has them all.")
@click.option("--encoder", help=ENCODER)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Directory for the index.")
@click.option(
    "--shards",
    "folder",
    type=click.Path(path_type=Path),
    help="Folder of `genpoe index encode`, or a new one to keep.  [default: a temporary folder]",
)
@click.option("--factory", help="FAISS factory string; Flat is exact search.  [default: by size and memory]")
@click.option("--memory", type=Size(), help="Memory limit of the build, such as 16GB.  [default: the free memory]")
@click.option("--k1", type=click.FloatRange(0), help="BM25: how much repeated words count.  [default: 1.5]")
@click.option("--b", type=click.FloatRange(0, 1), help="BM25: how much long passages are scored down.  [default: 0.75]")
@with_tuning
@with_encoding
@click.pass_context
def build(
    context: click.Context,
    retriever: str,
    passages: Path | None,
    encoder: str | None,
    out: Path,
    folder: Path | None,
    factory: str | None,
    memory: int | None,
    k1: float | None,
    b: float | None,
    recall: float,
    queries: Path | None,
    batch_size: int,
    device: str,
    dtype: str,
    store: str,
    shard_size: int,
    question_prompt: str | None,
    passage_prompt: str | None,
    dimensions: int | None,
) -> None:
    """Build a search index from PASSAGES or from SHARDS. Rerun the same command to resume.

    An index for --retriever bm25 takes --passages, --out, --k1 and --b alone, and is not resumed.
    """
    _refuse_options_of_others(context, retriever)
    if retriever == BM25:
        _build_bm25(passages, out, k1, b)
        return
    from genpoe_plugin.errors import InputError
    from genpoe_plugin.files import clear_leftovers
    from genpoe_plugin.indexing.building import (
        already_built,
        build_index,
        building_directory,
        check_directory,
        shards_directory,
    )
    from genpoe_plugin.indexing.shards import Shards
    from genpoe_plugin.retrieval.encoder_options import DEFAULT_OPTIONS, EncoderOptions
    from genpoe_plugin.retrieval.faiss_setup import make_index

    check_directory(out)
    options = EncoderOptions(question_prompt, passage_prompt, dimensions)
    settings: dict[str, Any] = {"factory": factory, "memory": memory, "recall": recall}
    model = None
    if passages is not None:
        from genpoe_plugin.indexing.encoding import encode_shards
        from genpoe_plugin.retrieval.encoder import load_encoder

        if encoder is None:
            raise InputError("--passages needs --encoder, the model to encode them with")
        model = load_encoder(
            encoder, device=_process_device(device), batch_size=batch_size, dtype=dtype, options=options
        )
        if factory is not None:
            make_index(factory, model.dimension)  # checks the string before the long work
        if already_built(out, passages, model, **settings, queries=queries):
            if _process_info().rank == 0:
                clear_leftovers(out, building_directory(out))
            click.echo(f"{out}: already built from the same passages with the same settings")
            return
        with shards_directory(out, folder) as target:
            shards = encode_shards(passages, model, target, shard_size=shard_size, dtype=store)
        if _process_info().rank != 0:
            return
    elif options != DEFAULT_OPTIONS:
        raise InputError("--question-prompt, --passage-prompt and --dimensions belong to the encoding; give --passages")
    elif folder is not None:
        shards = Shards.open(folder)
    else:
        raise InputError("give --passages and --encoder, or --shards with the folder of `genpoe index encode`")
    encoded_queries = None if queries is None else _encode_questions(queries, shards, encoder, model, device)
    del model  # frees memory for the build
    built = build_index(shards, out, **settings, queries=encoded_queries)
    click.echo(
        f"{out}: {len(built):,} passages, {built.dimension} dimensions, {built.manifest['factory']}{_recall(built)}"
    )


def _refuse_options_of_others(context: click.Context, retriever: str) -> None:
    """Raise an `InputError` for an option that was given but is of another retriever."""
    from genpoe_plugin.errors import InputError

    for parameter in context.command.params:
        name = str(parameter.name)
        given = context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
        kind = BM25 if name in BM25_OPTIONS else DENSE
        if given and name not in COMMON_OPTIONS and kind != retriever:
            raise InputError(
                f"{parameter.opts[0]}: an option for --retriever {kind}, not for {retriever}; leave it out"
            )


def _build_bm25(passages: Path | None, out: Path, k1: float | None, b: float | None) -> None:
    from genpoe_plugin.errors import InputError
    from genpoe_plugin.files import clear_leftovers
    from genpoe_plugin.indexing import bm25_building

    if passages is None:
        raise InputError("--retriever bm25 needs --passages, the passages to index")
    if _process_info().rank != 0:
        return
    k1, b = bm25_building.K1 if k1 is None else k1, bm25_building.B if b is None else b
    if bm25_building.already_built(out, passages, k1=k1, b=b):
        clear_leftovers(out)
        click.echo(f"{out}: already built from the same passages with the same settings")
        return
    built = bm25_building.build_bm25(passages, out, k1=k1, b=b)
    click.echo(f"{out}: {len(built.passages):,} passages, BM25, {built.manifest['vocabulary']:,} words")


@index.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--shards", "folder", required=True, type=click.Path(path_type=Path), help="Shards that the index was built from."
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
    encoded_queries = None if queries is None else _encode_questions(queries, shards, encoder, None, device)
    click.echo(f"{directory}: {opened.manifest['factory']}{_recall(retune(opened, shards, recall, encoded_queries))}")


@index.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--verify", is_flag=True, help="Read every byte and compare checksums.")
def info(directory: Path, verify: bool) -> None:
    """Describe the index in DIRECTORY."""
    from genpoe_plugin.retrieval.manifest import read_manifest, retriever_kind, verify_files

    kind = retriever_kind(read_manifest(directory))
    manifest = _bm25_info(directory) if kind == BM25 else _dense_info(directory)
    if verify:
        verify_files(directory, manifest)
    for name, file in manifest["files"].items():
        click.echo(f"{name:<16} {file['bytes']:,} bytes{', verified' if verify else ''}")


def _bm25_info(directory: Path) -> dict[str, Any]:
    """Print the facts of an index of BM25, and return its manifest."""
    from genpoe_plugin.retrieval.bm25 import LANGUAGE, BM25Retriever

    opened = BM25Retriever.load(directory)
    click.echo(f"passages     {len(opened.passages):,}")
    click.echo(f"retriever    {opened.name}, k1 {opened.manifest['k1']:g}, b {opened.manifest['b']:g}")
    click.echo(f"words        {opened.manifest['vocabulary']:,}, {LANGUAGE}, stemmed, without stop words")
    click.echo(f"fingerprint  {opened.fingerprint}")
    return opened.manifest


def _dense_info(directory: Path) -> dict[str, Any]:
    """Print the facts of an index of vectors, and return its manifest."""
    from genpoe_plugin.retrieval.index import PassageIndex

    opened = PassageIndex.load(directory)
    search = opened.manifest["search"]
    parameters = ", ".join(f"{name} {value:g}" for name, value in search["parameters"].items())
    click.echo(f"passages     {len(opened):,}")
    click.echo(f"dimensions   {opened.dimension}")
    click.echo(f"factory      {opened.manifest['factory']}")
    click.echo(f"search       {parameters or 'no parameters'}{_recall(opened)}")
    click.echo(f"measured by  {search['queries']}")
    click.echo(f"encoder      {opened.encoder_name}")
    options = opened.encoder_options
    for side, prompt in (("question", options.question_prompt), ("passage", options.passage_prompt)):
        if prompt:
            click.echo(f"{side:<9}    {prompt!r} before it")
    click.echo(f"pooling      {opened.manifest['pooling']}")
    click.echo(f"fingerprint  {opened.encoder_fingerprint}")
    return opened.manifest


def _recall(index: PassageIndex) -> str:
    search = index.manifest["search"]
    return f", recall@{search['recall_at']} {search['recall']:.3f}" if "recall_at" in search else ""


def _encode_questions(path: Path, shards: Shards, name: str | None, model: Encoder | None, device: str) -> Queries:
    """Encode the questions of a file with the encoder of the shards.

    Raises:
        InputError: there are no questions, or the encoder is not that of the shards.
    """
    from genpoe_plugin.data.questions import read_questions
    from genpoe_plugin.errors import InputError
    from genpoe_plugin.indexing.building import Queries
    from genpoe_plugin.retrieval.encoder import load_encoder
    from genpoe_plugin.retrieval.encoder_options import in_words

    questions = [question.question for question in read_questions(path)]
    if not questions:
        raise InputError(f"{path}: no questions")
    model = model or load_encoder(name or shards.encoder_name, device=device, options=shards.encoder_options)
    if model.fingerprint != shards.encoder_fingerprint:
        raise InputError(
            f"{shards.directory}: encoded with "
            f"{in_words(shards.encoder_name, shards.encoder_fingerprint, shards.encoder_options)}, questions with "
            f"{in_words(model.name, model.fingerprint, model.options)}; give the former as --encoder"
        )
    return Queries(model.encode_questions(questions), str(path.resolve()))


def _process_info() -> Any:
    """Rank and number of this process under `accelerate launch`."""
    from accelerate.utils import get_cpu_distributed_information

    return get_cpu_distributed_information()


def _process_device(device: str) -> str:
    """The GPU of this process, if `accelerate launch` started several with ``--device cuda``."""
    info = _process_info()
    return f"cuda:{info.local_rank}" if device == "cuda" and info.local_world_size > 1 else device
