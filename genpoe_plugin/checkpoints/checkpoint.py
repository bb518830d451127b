"""The checkpoint of a hypernetwork: a directory with its weights and configuration.

model.safetensors   the weights of the hypernetwork, with its base matrices
config.json         its configuration, the identity of LLM and tokenizer, versions, training arguments
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from genpoe_plugin import __version__
from genpoe_plugin.errors import InputError
from genpoe_plugin.experts.config import HypernetworkConfig
from genpoe_plugin.experts.hypernetwork import Hypernetwork
from genpoe_plugin.files import atomic_directory, atomic_file, check_replaceable
from genpoe_plugin.hub import UNREACHABLE, download, make_repository, upload
from genpoe_plugin.json_text import read_json
from genpoe_plugin.llm.language_model import embedding_entries, embedding_table

if TYPE_CHECKING:
    from genpoe_plugin.checkpoints.card import ModelCard

FORMAT = "genpoe-hypernetwork"
FORMAT_VERSION = 1
SAMPLES = 256  # entries of an LLM's embeddings that identify it
WEIGHTS, CONFIG = "model.safetensors", "config.json"
_SHAPE_FIELDS = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def llm_identity(model: PreTrainedModel) -> dict[str, Any]:
    """The identity of an LLM, the same in every precision: its dimensions, and a sample of its embeddings.

    The sample is 256 entries at fixed places. It is stored as numbers, because a hash would depend on the dtype.
    """
    config = model.config.get_text_config()
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(config.vocab_size, (SAMPLES,), generator=generator)
    columns = torch.randint(config.hidden_size, (SAMPLES,), generator=generator)
    sample = embedding_entries(model, rows, columns)
    return {
        "name": model.config.name_or_path,
        **{field: getattr(config, field) for field in _SHAPE_FIELDS},
        "embedding_sample": [round(value, 7) for value in sample.tolist()],
    }


def _difference(saved: Mapping[str, Any], loaded: Mapping[str, Any], quantised: bool) -> str | None:
    """The difference between the identities of two LLMs, as text; None if they are the same LLM."""
    for field in _SHAPE_FIELDS:
        if saved[field] != loaded[field]:
            return f"{field} {saved[field]} there, {loaded[field]} here"
    loaded_sample, saved_sample = torch.tensor(loaded["embedding_sample"]), torch.tensor(saved["embedding_sample"])
    if quantised:
        # Some formats (GGUF) round embeddings to a few bits; the distance to another LLM's is larger than their norm.
        same = torch.dist(loaded_sample, saved_sample) <= saved_sample.norm() / 4
    else:
        # bfloat16 has 8 significant bits, so two precisions of one model may differ by this much.
        same = torch.allclose(loaded_sample, saved_sample, rtol=2**-8, atol=1e-6)
    return None if same else "other embeddings"


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of the tokenizer's vocabulary and of its tokens for a fixed text."""
    probe = tokenizer("Who was born in 1872, and where?\n Ça: 東京 — 3.14\tFrançois' cat?", add_special_tokens=False)
    content = json.dumps([sorted(tokenizer.get_vocab().items()), probe["input_ids"]])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def write_hypernetwork(
    directory: Path,
    config: HypernetworkConfig,
    weights: Mapping[str, Tensor],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    training: Mapping[str, Any],
) -> None:
    """Write the two files of a checkpoint into ``directory``, ``config.json`` last.

    Args:
        directory: directory of the checkpoint.
        config: configuration of the hypernetwork.
        weights: weights of the hypernetwork, with its base matrices.
        model, tokenizer: the LLM that it is for.
        training: arguments and results of the training, to be recorded.
    """
    record = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "hypernetwork": config.to_dict(),
        "llm": llm_identity(model),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "versions": {"genpoe": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "training": dict(training),
    }
    with atomic_file(directory / WEIGHTS) as temporary:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, temporary)
    with atomic_file(directory / CONFIG) as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def save_hypernetwork(
    directory: str | Path,
    hypernetwork: Hypernetwork,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    training: Mapping[str, Any],
) -> None:
    """Write a checkpoint directory atomically; it replaces an older checkpoint."""
    with atomic_directory(directory) as temporary:
        write_hypernetwork(temporary, hypernetwork.config, hypernetwork.state_dict(), model, tokenizer, training)


@dataclass(frozen=True)
class HypernetworkCheckpoint:
    """A stored hypernetwork, which can be inspected and copied without its LLM.

    Attributes:
        name: the directory or repository, as the user named it.
        directory: local directory of its files.
        commit: commit of its hub repository; None for a local directory.
    """

    name: str
    directory: Path
    commit: str | None = None

    @classmethod
    def from_pretrained(
        cls, name: str | Path | HypernetworkCheckpoint, *, revision: str | None = None
    ) -> HypernetworkCheckpoint:
        """Find a checkpoint, and download it if it is not a local directory.

        Args:
            name: a directory, or a hub repository: ``user/name``, or ``user/name@revision`` with a branch, tag or
                commit. Private repositories need a token, in ``HF_TOKEN`` or from ``hf auth login``. A checkpoint is
                returned unchanged.
            revision: revision of the repository, if ``name`` has none.

        Raises:
            InputError: there is no such checkpoint or revision, or a file is missing. The message names the commands
                that create checkpoints.
        """
        if isinstance(name, HypernetworkCheckpoint):
            if revision is not None:
                raise InputError(f"revision={revision}: the checkpoint is already loaded; leave out the revision")
            return name
        directory, commit = Path(name), None
        if not directory.is_dir() or revision is not None:
            from genpoe_plugin.checkpoints.card import CARD, SHOWN

            try:
                directory, commit = download(name, (WEIGHTS, CONFIG, CARD, *SHOWN), revision)
            except InputError as error:
                raise InputError(f"hypernetwork {error}") from error
            except UNREACHABLE as error:
                raise InputError(
                    f"hypernetwork {name}: neither a directory nor a reachable hub repository (a private one needs "
                    "`hf auth login` or HF_TOKEN); create one with `genpoe train hypernetwork` or `genpoe experts "
                    "create`"
                ) from error
        for file in (CONFIG, WEIGHTS):
            if not (directory / file).is_file():
                raise InputError(f"hypernetwork {name}: {file} is missing; a checkpoint has {CONFIG} and {WEIGHTS}")
        return cls(str(name), directory, commit)

    @cached_property
    def record(self) -> dict[str, Any]:
        """The content of config.json.

        Raises:
            InputError: it is not the configuration of a hypernetwork.
        """
        return read_record(self.directory)

    @property
    def config(self) -> HypernetworkConfig:
        """The hypernetwork's configuration.

        Raises:
            InputError: config.json is not the configuration of a hypernetwork.
        """
        return HypernetworkConfig.from_dict(self.record["hypernetwork"])

    @property
    def base_model(self) -> str:
        """The LLM that the hypernetwork is for: the directory or hub name that it was loaded from.

        Raises:
            InputError: config.json is not the configuration of a hypernetwork.
        """
        return str(self.record["llm"]["name"])

    @cached_property
    def fingerprint(self) -> str:
        """A hash of weights and configuration, independent of their location."""
        digest = hashlib.sha256()
        for file in (CONFIG, WEIGHTS):
            with (self.directory / file).open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
        return digest.hexdigest()[:16]

    def load(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, depth: int | None = None
    ) -> Hypernetwork:
        """Load the hypernetwork for ``model``, on the device of its embeddings, in float32 and evaluation mode.

        Args:
            model, tokenizer: the LLM that the checkpoint is for, in any precision or quantised.
            depth: number of layers of the whole LLM, if ``model`` has only its lower layers.

        Raises:
            InputError: the files are damaged, or the checkpoint is for another LLM or tokenizer.
        """
        loaded, saved = llm_identity(model), self.record["llm"]
        if depth is not None:
            loaded["num_hidden_layers"] = depth
        if difference := _difference(saved, loaded, getattr(model, "is_quantized", False)):
            raise InputError(
                f"hypernetwork {self.name} was trained for {saved['name']}, this is {loaded['name']} ({difference}); "
                "use that LLM, or create another checkpoint with `genpoe train hypernetwork` or `genpoe experts create`"
            )
        if self.record["tokenizer"] != tokenizer_fingerprint(tokenizer):
            raise InputError(
                f"hypernetwork {self.name} was trained with the tokenizer of {saved['name']}, "
                f"which is not the one in use ({tokenizer.name_or_path})"
            )
        config = self.config
        try:
            self._check_shapes(config)
            hypernetwork = Hypernetwork(config)
            hypernetwork.load_state_dict(load_file(self.directory / WEIGHTS))
        except (SafetensorError, RuntimeError, ValueError, TypeError, OverflowError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"{self.directory / WEIGHTS}: damaged, or its shapes differ from config.json ({reason})"
            ) from error
        with embedding_table(model) as table:
            return hypernetwork.to(table.device).eval().requires_grad_(False)

    def _check_shapes(self, config: HypernetworkConfig) -> None:
        """Raise a `ValueError` if the file's tensors are not those of ``config``, before memory is allocated."""
        with torch.device("meta"):
            expected = {name: list(tensor.shape) for name, tensor in Hypernetwork(config).state_dict().items()}
        with safe_open(self.directory / WEIGHTS, framework="pt") as file:
            stored = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118, no iterator
        for name in sorted(expected.keys() | stored.keys()):
            if expected.get(name) != stored.get(name):
                raise ValueError(f"{name} is {stored.get(name)} there, {expected.get(name)} by config.json")

    def save_pretrained(self, directory: str | Path) -> None:
        """Copy the checkpoint and its card to ``directory`` atomically; the copy replaces an older checkpoint.

        Weights and configuration are copied byte for byte, so the copy has the same fingerprint.

        Raises:
            InputError: the directory holds something that is not a checkpoint.
        """
        from genpoe_plugin.checkpoints.card import CARD, SHOWN

        if Path(directory).resolve() == self.directory.resolve():
            return
        check_replaceable(directory, is_checkpoint, "a checkpoint")
        with atomic_directory(directory) as temporary:
            for name in (*SHOWN, CARD, WEIGHTS, CONFIG):
                if (self.directory / name).is_file():
                    shutil.copyfile(self.directory / name, temporary / name)

    def push_to_hub(self, repository: str, *, revision: str | None = None, private: bool | None = None) -> str:
        """Upload the checkpoint and its card to the hub; the card's example then loads it from the hub.

        The upload needs a token, in ``HF_TOKEN`` or from ``hf auth login``.

        Args:
            repository: ``user/name``, or a name in the user's own namespace; it is created if it does not exist.
            revision: branch to upload to; it is created if it does not exist. By default the main branch.
            private: whether a new repository is private; by default the hub decides.

        Returns:
            The URL of the commit.

        Raises:
            InputError: the hub is unreachable, or refuses the upload.
        """
        from genpoe_plugin.checkpoints.card import CARD, name_in_card, write_card

        repository = make_repository(repository, revision, private=private)
        name = repository if revision is None else f"{repository}@{revision}"
        with TemporaryDirectory() as folder:
            copy = Path(folder) / "checkpoint"
            self.save_pretrained(copy)
            card = copy / CARD
            if card.is_file():
                text = card.read_text(encoding="utf-8")
                card.write_text(name_in_card(text, name), encoding="utf-8")
            else:
                write_card(copy, self._card(name))
            return upload(copy, repository, revision)

    def _card(self, name: str) -> ModelCard:
        """A card for a checkpoint without one."""
        from genpoe_plugin.checkpoints.card import ModelCard

        config, training = self.config, self.record["training"]
        untrained = config.head == "attention" and not config.is_trained
        return ModelCard(
            kind="experts" if untrained else "hypernetwork",
            base_model=self.base_model,
            out=name,
            form=config.to_dict(),
            data=[],
            arguments={},
            command=[],
            steps=training.get("step", 0),
            versions=self.record["versions"],
        )


def resolve_checkpoint(name: str | Path) -> Path:
    """The local directory of a checkpoint; see `HypernetworkCheckpoint.from_pretrained`."""
    return HypernetworkCheckpoint.from_pretrained(name).directory


def read_record(directory: Path) -> dict[str, Any]:
    """Read a checkpoint's config.json.

    Raises:
        InputError: it is not the configuration of a hypernetwork.
    """
    try:
        record = read_json(directory / CONFIG)
    except ValueError as error:
        raise InputError(f"{directory / CONFIG}: not JSON ({error})") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise InputError(f"{directory / CONFIG}: not a hypernetwork's configuration")
    if record.get("version") != FORMAT_VERSION:
        raise InputError(f"{directory / CONFIG}: format {record.get('version')}; this version reads {FORMAT_VERSION}")
    if not _is_complete(record):
        raise InputError(f"{directory / CONFIG}: fields are missing or have other types; the file is damaged")
    return record


def _is_complete(record: dict[str, Any]) -> bool:
    """Whether a configuration has everything that identifies its LLM, with values of the right types."""
    llm = record.get("llm")
    parts = isinstance(record.get("hypernetwork"), dict) and isinstance(record.get("tokenizer"), str)
    if not (parts and isinstance(llm, dict) and llm.keys() >= {"name", "embedding_sample", *_SHAPE_FIELDS}):
        return False
    sample = llm["embedding_sample"]
    return isinstance(sample, list) and len(sample) == SAMPLES and all(isinstance(x, int | float) for x in sample)


def is_checkpoint(directory: Path) -> bool:
    """Whether a directory holds the checkpoint of a hypernetwork, for any LLM."""
    try:
        read_record(directory)
    except (InputError, OSError):
        return False
    return True


def load_hypernetwork(
    name: str | Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, depth: int | None = None
) -> Hypernetwork:
    """Load a checkpoint for ``model``; see `HypernetworkCheckpoint.load`."""
    return HypernetworkCheckpoint.from_pretrained(name).load(model, tokenizer, depth=depth)


def read_config(name: str | Path) -> HypernetworkConfig:
    """The configuration of a checkpoint, for any LLM.

    Raises:
        InputError: a file is missing, or config.json is not the configuration of a hypernetwork.
    """
    return HypernetworkCheckpoint.from_pretrained(name).config


def checkpoint_fingerprint(name: str | Path) -> str:
    """A hash of a checkpoint's weights and configuration, independent of their location."""
    return HypernetworkCheckpoint.from_pretrained(name).fingerprint
