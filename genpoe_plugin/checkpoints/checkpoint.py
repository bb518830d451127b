"""A trained hypernetwork as a directory: weights, configuration, and what LLM it belongs to.

model.safetensors   the hypernetwork and its base matrices
config.json         its configuration, the LLM's and tokenizer's identity, versions, training arguments
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
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from genpoe_plugin import __version__
from genpoe_plugin.errors import InputError
from genpoe_plugin.experts.config import HypernetworkConfig
from genpoe_plugin.experts.hypernetwork import Hypernetwork
from genpoe_plugin.files import atomic_directory, atomic_file, check_replaceable
from genpoe_plugin.hub import UNREACHABLE, download, make_repository, upload
from genpoe_plugin.llm.language_model import embedding_entries, embedding_table

if TYPE_CHECKING:
    from genpoe_plugin.checkpoints.card import ModelCard  # imported on use, since it brings what draws curves

FORMAT = "genpoe-hypernetwork"
FORMAT_VERSION = 1
WEIGHTS, CONFIG = "model.safetensors", "config.json"
_SHAPE_FIELDS = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def llm_identity(model: PreTrainedModel) -> dict[str, Any]:
    """What tells one LLM from another and stays the same whatever precision it is loaded in.

    Its dimensions, and 256 entries of its embedding table at fixed places: as numbers, since a hash would change
    with the dtype.
    """
    config = model.config.get_text_config()
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(config.vocab_size, (256,), generator=generator)
    columns = torch.randint(config.hidden_size, (256,), generator=generator)
    sample = embedding_entries(model, rows, columns)
    return {
        "name": model.config.name_or_path,
        **{field: getattr(config, field) for field in _SHAPE_FIELDS},
        "embedding_sample": [round(value, 7) for value in sample.tolist()],
    }


def _difference(saved: Mapping[str, Any], loaded: Mapping[str, Any], quantised: bool) -> str | None:
    for field in _SHAPE_FIELDS:
        if saved[field] != loaded[field]:
            return f"{field} {saved[field]} there, {loaded[field]} here"
    ours, theirs = torch.tensor(loaded["embedding_sample"]), torch.tensor(saved["embedding_sample"])
    if quantised:
        # Some forms (GGUF) round embeddings to a few bits; another LLM's are further away than their own size.
        same = torch.dist(ours, theirs) <= theirs.norm() / 4
    else:
        # bfloat16 keeps 8 bits, so that much is what two precisions of one model may differ by.
        same = torch.allclose(ours, theirs, rtol=2**-8, atol=1e-6)
    return None if same else "other embeddings"


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of how the tokenizer splits a fixed text, and of its vocabulary."""
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
    """Write the two files of a checkpoint into ``directory``, the one that makes it a checkpoint last.

    Args:
        config, weights: of the hypernetwork, base matrices included.
        model, tokenizer: the LLM that it was trained for.
        training: arguments and results of the training, for the record.
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
    """Write a checkpoint directory, all of it or nothing; an older checkpoint there is replaced."""
    with atomic_directory(directory) as temporary:
        write_hypernetwork(temporary, hypernetwork.config, hypernetwork.state_dict(), model, tokenizer, training)


@dataclass(frozen=True)
class HypernetworkCheckpoint:
    """A hypernetwork as it is stored, whatever LLM it is for.

    Attributes:
        name: the directory or repository, as it was asked for.
        directory: where its files are.
        commit: of the hub's repository that it is from; None for a directory.
    """

    name: str
    directory: Path
    commit: str | None = None

    @classmethod
    def from_pretrained(
        cls, name: str | Path | HypernetworkCheckpoint, *, revision: str | None = None
    ) -> HypernetworkCheckpoint:
        """Find a checkpoint, and download it if it is not a directory.

        Args:
            name: a directory, or a repository of the hub: ``user/name``, or ``user/name@revision`` with a branch, a tag
                or a commit. A private one is read with the token in ``HF_TOKEN``, or that ``hf auth login`` keeps.
                A checkpoint is returned as it is.
            revision: of a repository, where it is not in its name.

        Raises:
            InputError: there is none, there is no such revision, or a file is missing; the message names the command
                that makes one.
        """
        if isinstance(name, HypernetworkCheckpoint):
            if revision is not None:
                raise InputError(f"revision={revision}: the checkpoint is found already; leave it out")
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
                    f"hypernetwork {name}: neither a directory nor a repository of the hub within reach (a private one "
                    "needs `hf auth login` or HF_TOKEN); `genpoe train hypernetwork` or `genpoe experts create` makes "
                    "one"
                ) from error
        for file in (CONFIG, WEIGHTS):
            if not (directory / file).is_file():
                raise InputError(f"hypernetwork {name}: {file} is missing; the command that made it writes both")
        return cls(str(name), directory, commit)

    @cached_property
    def record(self) -> dict[str, Any]:
        """The content of config.json.

        Raises:
            InputError: it is not one of ours.
        """
        return read_record(self.directory)

    @property
    def config(self) -> HypernetworkConfig:
        """The hypernetwork's form.

        Raises:
            InputError: config.json is not one of ours.
        """
        return HypernetworkConfig.from_dict(self.record["hypernetwork"])

    @property
    def base_model(self) -> str:
        """The LLM that it is for: the directory or hub name that it was loaded by.

        Raises:
            InputError: config.json is not one of ours.
        """
        return str(self.record["llm"]["name"])

    @cached_property
    def fingerprint(self) -> str:
        """A hash of weights and configuration, the same for the same content anywhere."""
        digest = hashlib.sha256()
        for file in (CONFIG, WEIGHTS):
            with (self.directory / file).open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
        return digest.hexdigest()[:16]

    def load(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, depth: int | None = None
    ) -> Hypernetwork:
        """The hypernetwork for ``model``, on the device of its embeddings, in float32 and evaluation mode.

        Args:
            model, tokenizer: the LLM to use it with; it must be the one that it was trained for, in any precision or
                quantised.
            depth: how many layers the LLM has where ``model`` is only its lower part.

        Raises:
            InputError: the files are damaged, or the checkpoint belongs to another LLM or tokenizer.
        """
        here, there = llm_identity(model), self.record["llm"]
        if depth is not None:
            here["num_hidden_layers"] = depth
        if difference := _difference(there, here, getattr(model, "is_quantized", False)):
            raise InputError(
                f"hypernetwork {self.name} was trained for {there['name']}, this is {here['name']} ({difference}); "
                "use that LLM, or make another with `genpoe train hypernetwork` or `genpoe experts create`"
            )
        if self.record["tokenizer"] != tokenizer_fingerprint(tokenizer):
            raise InputError(
                f"hypernetwork {self.name} was trained with the tokenizer of {there['name']}, "
                f"which is not the one in use ({tokenizer.name_or_path})"
            )
        hypernetwork = Hypernetwork(self.config)
        try:
            hypernetwork.load_state_dict(load_file(self.directory / WEIGHTS))
        except (SafetensorError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"{self.directory / WEIGHTS}: damaged or of another shape than config.json says ({reason})"
            ) from error
        with embedding_table(model) as table:
            return hypernetwork.to(table.device).eval().requires_grad_(False)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write it into a directory, with its card: all of it or nothing; an older checkpoint there is replaced.

        Weights and configuration are copied byte for byte, so the copy has the same fingerprint.

        Raises:
            InputError: something else is there.
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
        """Upload it, with its card, in which the example loads it from there.

        The token is that in ``HF_TOKEN``, or the one that ``hf auth login`` keeps.

        Args:
            repository: ``user/name``, or a name among one's own; it is made if it is not there.
            revision: a branch, which is made if it is not there; the main one without it.
            private: whether the repository is made as one that others do not see; as the hub has it without it.

        Returns:
            The address of the commit.

        Raises:
            InputError: the hub is out of reach, or does not let the user do that.
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
        """Of a checkpoint that was made without one."""
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
    """The local directory of a checkpoint: see `HypernetworkCheckpoint.from_pretrained`."""
    return HypernetworkCheckpoint.from_pretrained(name).directory


def read_record(directory: Path) -> dict[str, Any]:
    """The content of a checkpoint's config.json.

    Raises:
        InputError: it is not one of ours.
    """
    try:
        record = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{directory / CONFIG}: not JSON ({error})") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise InputError(f"{directory / CONFIG}: not a hypernetwork's configuration")
    if record.get("version") != FORMAT_VERSION:
        raise InputError(f"{directory / CONFIG}: format {record.get('version')}; this version reads {FORMAT_VERSION}")
    return record


def is_checkpoint(directory: Path) -> bool:
    """Whether a directory holds a checkpoint of ours, of any LLM."""
    try:
        read_record(directory)
    except (InputError, OSError):
        return False
    return True


def load_hypernetwork(
    name: str | Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, depth: int | None = None
) -> Hypernetwork:
    """Load a checkpoint for ``model``: see `HypernetworkCheckpoint`, its `from_pretrained` and `load`."""
    return HypernetworkCheckpoint.from_pretrained(name).load(model, tokenizer, depth=depth)


def read_config(name: str | Path) -> HypernetworkConfig:
    """The configuration of a checkpoint, whatever LLM it is for.

    Raises:
        InputError: files are missing, or it is not one of ours.
    """
    return HypernetworkCheckpoint.from_pretrained(name).config


def checkpoint_fingerprint(name: str | Path) -> str:
    """A hash of a checkpoint's weights and configuration, the same for the same content anywhere."""
    return HypernetworkCheckpoint.from_pretrained(name).fingerprint
