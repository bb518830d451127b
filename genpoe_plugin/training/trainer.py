"""The training loop for rerankers and hypernetworks: draws, gradients, steps, validation, saving and resuming.

Under ``accelerate launch``, every process computes its share of each batch.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from tqdm import tqdm

from genpoe_plugin.errors import InputError
from genpoe_plugin.files import atomic_file, lock_file, only_writer
from genpoe_plugin.json_text import read_json
from genpoe_plugin.training.curves import write_curves
from genpoe_plugin.training.draws import Draw, batch_at
from genpoe_plugin.training.trainer_state import Progress, find_state, full_state, load_state, read_progress, save_state
from genpoe_plugin.training.training_arguments import TrainingArguments

RECORD = "training.json"
"""The run's record. It is written last, so a directory with it holds a finished run."""
STATE = "trainer_state"
BEST = "best.safetensors"


class Learner(Protocol):
    """The model, data and loss of a training.

    Attributes:
        name: name for messages, such as "reranker".
        module: the module to train: its parameters that require gradients. The trainer may wrap it.
        examples: number of examples to draw from.
    """

    name: str
    module: nn.Module

    @property
    def examples(self) -> int: ...

    def losses(self, draws: Sequence[Draw], step: int) -> Tensor:
        """The loss of each draw, ``[n]``, differentiable.

        Args:
            draws: the examples of a (micro) batch.
            step: the optimizer step; it seeds random choices for the whole batch.
        """

    def validate(self, process: int, processes: int) -> dict[str, float]:
        """Measures on held-out data, by name; empty without such data.

        The first measure decides which weights are best, the next ones break ties. Higher is better, except for
        ``loss``. Every process measures its share, and each gets the measures of all data.

        Args:
            process: rank of this process.
            processes: number of processes.
        """

    def save(self, directory: Path, weights: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Write a checkpoint.

        Args:
            directory: directory of the checkpoint.
            weights: all trained weights and buffers.
            record: facts about the training, for the checkpoint.
        """


def train(
    learner: Learner,
    arguments: TrainingArguments,
    identity: Mapping[str, Any],
    out: Path,
    accelerator: Accelerator,
) -> Progress:
    """Train ``learner`` and write its checkpoint to ``out``; resume an earlier run with the same arguments.

    Args:
        learner: model, data and loss.
        arguments: arguments of the training.
        identity: everything that decides the result, by name: arguments, model, data, form.
        out: directory for the learner's checkpoint (of the best validation, or of the last step without validation),
            the curves and ``training.json``. ``last/`` holds the last step's weights if earlier ones were better.
            ``trainer_state/`` exists until the run is finished.
        accelerator: device and processes of the run.

    Returns:
        The progress of the whole run, also if it was already finished.

    Raises:
        InputError: ``out`` holds another run or something else, another process writes it, it cannot be written, or the
            loss is not finite.
        KeyboardInterrupt: interrupted; the state is saved.
    """
    run = _Run(learner, arguments, out, accelerator)
    identity = {**identity, "processes": accelerator.num_processes}
    finished = finished_run(out, identity)
    if finished is not None and not lock_file(out).exists():
        return finished  # `out` may be a folder that cannot be written
    locked: AbstractContextManager[Any] = only_writer(out) if accelerator.is_main_process else nullcontext()
    with locked, torch.random.fork_rng():
        if finished is not None:  # killed while it was cleaning up
            shutil.rmtree(out / STATE, ignore_errors=True)
            return finished
        return run.finish(run.optimise(identity))


def finished_run(out: Path, identity: Mapping[str, Any]) -> Progress | None:
    """The finished run in ``out``; None if the run is unfinished or ``out`` is empty.

    Raises:
        InputError: ``out`` holds a run with other arguments, or something else.
    """
    if (out / RECORD).is_file():
        progress = _read_record(out / RECORD)
    elif (saved := find_state(out / STATE)) is not None:
        progress = read_progress(saved)
    elif out.is_file() or (out.is_dir() and any(path.name != STATE for path in out.iterdir())):
        raise InputError(f"{out}: holds something that is not a training run; give another directory")
    else:
        return None
    requested, stored = json.loads(json.dumps(identity)), progress.arguments
    if different := sorted(
        name for name in requested.keys() | stored.keys() if requested.get(name) != stored.get(name)
    ):
        changes = "; ".join(f"{name} was {stored.get(name)}, is {requested.get(name)}" for name in different)
        raise InputError(f"{out}: holds a run with other arguments ({changes}); give another --out or delete it")
    return progress if (out / RECORD).is_file() else None


def is_finished(out: Path) -> bool:
    """Whether ``out`` holds a finished run, with any arguments."""
    return (out / RECORD).is_file()


def _read_record(path: Path) -> Progress:
    try:
        record = read_json(path)
        record["losses"] = [tuple(row) for row in record["losses"]]
        return Progress(**record)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not the record of a training run; give another directory") from error


class _UnfinishedStep(Exception):
    """Raised after Ctrl-C in a step that has changed nothing yet."""


class _Run:
    """One run of the training loop."""

    def __init__(self, learner: Learner, arguments: TrainingArguments, out: Path, accelerator: Accelerator) -> None:
        self.learner = learner
        self.arguments = arguments
        self.out = out
        self.accelerator = accelerator
        self.steps = arguments.steps(learner.examples, accelerator.num_processes)
        self.weights = [weight for weight in learner.module.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(self.weights, lr=arguments.learning_rate, weight_decay=arguments.weight_decay)
        self.optimizer: torch.optim.Optimizer = optimizer
        self.device = self.weights[0].device
        self.interrupts = _Interrupts()
        self.saved: tuple[int, int] | None = None  # step and number of validations of the last save
        if accelerator.num_processes > 1:
            learner.module, prepared = accelerator.prepare(learner.module, optimizer)
            self.optimizer = prepared.optimizer
            self.weights = [weight for weight in learner.module.parameters() if weight.requires_grad]

    def optimise(self, identity: Mapping[str, Any]) -> Progress:
        """Run the remaining steps."""
        progress = Progress(dict(identity))
        if (saved := find_state(self.out / STATE)) is not None:
            progress = read_progress(saved)
            load_state(saved, self.learner.module, self.optimizer)
            self.saved = progress.step, len(progress.validations)
        hidden = not self.accelerator.is_main_process
        bar = tqdm(
            desc=f"Training the {self.learner.name}",
            total=self.steps,
            initial=progress.step,
            unit="step",
            disable=hidden,
        )
        with bar, self.interrupts.handled():
            if progress.step == 0 or self._unvalidated(progress):
                self._validate(progress)
            while progress.step < self.steps:
                try:
                    loss, stop = self._step(progress.step)
                except _UnfinishedStep:
                    self._stop(progress)
                if not math.isfinite(loss):
                    raise InputError(f"the loss at step {progress.step + 1} is {loss}; try a lower learning rate")
                progress.losses.append((progress.step + 1, loss, self.arguments.rate_at(progress.step, self.steps)))
                progress.step += 1
                bar.update()
                bar.set_postfix(loss=f"{loss:.3f}", rate=f"{progress.losses[-1][2]:.1e}")
                if self._due(progress.step) and not (stop and progress.validations):
                    self._validate(progress)
                if stop or progress.step == self.steps or progress.step % self.arguments.save_every == 0:
                    self._save(progress)
                if stop and (progress.step < self.steps or self._unvalidated(progress)):
                    self._stop(progress)
        return progress

    def _due(self, step: int) -> bool:
        """Whether a validation follows this step."""
        return step == self.steps or step % (self.arguments.validate_every or self.steps) == 0

    def _unvalidated(self, progress: Progress) -> bool:
        """Whether the validation of the last step was interrupted."""
        steps = [validation["step"] for validation in progress.validations]
        return bool(steps) and self._due(progress.step) and progress.step not in steps

    def _stop(self, progress: Progress) -> NoReturn:
        """Save the last finished step after Ctrl-C."""
        if not progress.step:
            raise KeyboardInterrupt("stopped before the first step; rerun the same command to start")
        # Saving the same again could only lose it: a process that is killed meanwhile leaves no complete state.
        if self.saved != (progress.step, len(progress.validations)):
            self._save(progress)
        raise KeyboardInterrupt(
            f"saved at step {progress.step} of {self.steps} in {self.out}; rerun the same command to resume"
        )

    def _step(self, step: int) -> tuple[float, bool]:
        """Run one optimizer step; return the mean loss of its batch, and whether any process should stop.

        Raises:
            _UnfinishedStep: interrupted before the optimizer has changed anything.
        """
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        size = self.arguments.batch_size
        batch = batch_at(step, self.learner.examples, size * processes, self.arguments.seed)
        share = -(-len(batch) // processes)
        micro = min(self.arguments.micro_batch_size or size, share)
        draws = batch[rank::processes]
        # All processes run the same number of passes, because they wait for each other: missing examples have weight 0.
        weights = [1 / len(batch)] * len(draws) + [0.0] * (share - len(draws))
        draws = draws + [batch[0]] * (share - len(draws))
        torch.manual_seed(_seed(self.arguments.seed, step, rank))
        rate = self.arguments.rate_at(step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.learner.module.train()
        total = 0.0
        # A step depends on nothing but its number and the weights, so an unfinished one can be left and run again.
        with self._stops_at_once():
            for start in range(0, share, micro):
                with self._synchronised(start + micro >= share), self._precision():
                    losses = self.learner.losses(draws[start : start + micro], step)
                    loss = (losses * torch.tensor(weights[start : start + micro], device=losses.device)).sum()
                    # The weights already average over all processes; the factor undoes accelerate's own averaging.
                    self.accelerator.backward(loss * processes)
                total += loss.item()
        sums = torch.tensor([total, float(self.interrupts.pressed)], dtype=torch.float64, device=self.device)
        if processes > 1:
            sums = self.accelerator.reduce(sums, "sum")
        self.accelerator.clip_grad_norm_(self.weights, self.arguments.max_gradient_norm)
        if math.isfinite(sums[0].item()):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return sums[0].item(), sums[1].item() > 0

    @contextmanager
    def _stops_at_once(self) -> Iterator[None]:
        """Turn Ctrl-C in the block into `_UnfinishedStep`. Several processes wait for each other, so they finish."""
        if self.accelerator.num_processes > 1:
            yield
            return
        try:
            with _noticed_in_backward(self.device), self.interrupts.at_once():
                yield
        except KeyboardInterrupt as interrupt:
            self.optimizer.zero_grad(set_to_none=True)
            raise _UnfinishedStep from interrupt

    @contextmanager
    def _synchronised(self, last: bool) -> Iterator[None]:
        """Synchronise gradients between processes only in the last pass of a step."""
        if last or self.accelerator.num_processes == 1:
            yield
        else:
            with self.accelerator.no_sync(self.learner.module):
                yield

    @contextmanager
    def _precision(self) -> Iterator[None]:
        enabled = self.arguments.precision == "bfloat16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled):
            yield

    def _validate(self, progress: Progress) -> None:
        """Validate the current step, unless an earlier run has done so.

        Raises:
            KeyboardInterrupt: interrupted; everything except this validation is saved.
        """
        if progress.step in [validation["step"] for validation in progress.validations]:
            return
        self.learner.module.eval()
        alone = self.accelerator.num_processes == 1
        try:
            # Validation changes no state, so Ctrl-C may stop it at once; but several processes wait for each other.
            with torch.no_grad(), self.interrupts.at_once() if alone else nullcontext():
                measures = self.learner.validate(self.accelerator.process_index, self.accelerator.num_processes)
        except KeyboardInterrupt:
            if not alone:
                raise
            self._stop(progress)
        if not measures:
            return
        earlier = [_quality(validation) for validation in progress.validations[1:]]
        progress.validations.append({"step": progress.step, **measures})
        if progress.step and all(_quality(measures) > quality for quality in earlier):
            progress.best = progress.step
            weights, _ = full_state(self.learner.module, self.optimizer)
            if self.accelerator.is_main_process:
                with _saving(self.out):
                    (self.out / STATE).mkdir(parents=True, exist_ok=True)
                    with atomic_file(self.out / STATE / BEST) as temporary:
                        save_file(weights, temporary)

    def _save(self, progress: Progress) -> None:
        weights, states = full_state(self.learner.module, self.optimizer)
        if self.accelerator.is_main_process:
            with _saving(self.out):
                save_state(self.out / STATE, weights, states, progress)
        self.saved = progress.step, len(progress.validations)
        self.accelerator.wait_for_everyone()

    def finish(self, progress: Progress) -> Progress:
        """Write checkpoint and curves, and finally the record that marks the run as finished."""
        weights, _ = full_state(self.learner.module, self.optimizer)
        if self.accelerator.is_main_process:
            with _saving(self.out):
                record = {"arguments": progress.arguments, "steps": progress.step, "validations": progress.validations}
                if progress.best not in (None, progress.step):
                    self.learner.save(self.out / "last", weights, {**record, "step": progress.step})
                    weights = load_file(self.out / STATE / BEST)
                self.learner.save(self.out, weights, {**record, "step": progress.best or progress.step})
                write_curves(self.out, progress.losses, progress.validations)
                with atomic_file(self.out / RECORD) as temporary:
                    temporary.write_text(json.dumps(vars(progress), indent=1) + "\n", encoding="utf-8")
                shutil.rmtree(self.out / STATE)
        self.accelerator.wait_for_everyone()
        return progress


@contextmanager
def _saving(out: Path) -> Iterator[None]:
    """Turn an error in writing to ``out``, such as a full disk, into an `InputError`."""
    try:
        yield
    except Exception as error:
        # safetensors has its own exception, tokenizers a plain one.
        if isinstance(error, OSError | SafetensorError) or "os error" in str(error):
            reason = getattr(error, "strerror", None) or error
            raise InputError(
                f"{out}: cannot be written ({reason}); the last save is kept; rerun the same command to resume"
            ) from error
        raise


def _quality(measures: Mapping[str, float]) -> tuple[float, ...]:
    """The measures as a tuple that is greater for better weights."""
    return tuple(-value if name == "loss" else value for name, value in measures.items() if name != "step")


def _seed(*parts: object) -> int:
    """A seed that depends on all of ``parts``."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


@contextmanager
def _noticed_in_backward(device: torch.device) -> Iterator[None]:
    """Let Ctrl-C interrupt a backward pass on a CPU, which is one call of C++ and takes most of a step.

    Python handles signals between two of its own instructions. Hooks that do nothing give it some of them, at the
    output of every module.
    """

    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.grad_fn is not None:
            output.register_hook(lambda gradient: None)

    if device.type != "cpu":
        yield
        return
    handle = register_module_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


class _Interrupts:
    """Ctrl-C during a training: delayed where the state would be inconsistent; a second one acts at once.

    Attributes:
        pressed: whether Ctrl-C was pressed while it was delayed.
    """

    def __init__(self) -> None:
        self.pressed = False
        self._at_once = False

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handle Ctrl-C in the block, unless it is ignored, as in a job in the background, or in another thread."""
        earlier = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is not threading.main_thread() or earlier in (None, signal.SIG_IGN):
            yield
            return
        signal.signal(signal.SIGINT, self._handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, earlier)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Let Ctrl-C interrupt the block at once."""
        if self.pressed:
            raise KeyboardInterrupt
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def _handle(self, number: int, frame: Any) -> None:
        if self._at_once or self.pressed:
            self._at_once = False
            self.pressed = True
            raise KeyboardInterrupt
        self.pressed = True
