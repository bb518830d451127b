"""The loop of both trainings: draws, gradients, steps, validation, and savings that a killed run goes on from.

Under ``accelerate launch`` every process takes its share of each batch; alone, nothing is distributed.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from genpoe_plugin.errors import InputError
from genpoe_plugin.files import atomic_file
from genpoe_plugin.training.arguments import TrainingArguments
from genpoe_plugin.training.curves import write_curves
from genpoe_plugin.training.draws import Draw, batch_at
from genpoe_plugin.training.state import Progress, find_state, full_state, load_state, read_progress, save_state

RECORD = "training.json"
"""Written last: a directory that has it holds a finished run."""
STATE = "trainer_state"
BEST = "best.safetensors"


class Learner(Protocol):
    """What a trainer trains.

    Attributes:
        name: for people, such as "reranker".
        module: the parameters of it that require gradients learn; the trainer may wrap it.
        examples: how many there are to draw from.
    """

    name: str
    module: nn.Module

    @property
    def examples(self) -> int: ...

    def losses(self, draws: Sequence[Draw], step: int) -> Tensor:
        """The loss of each of ``draws``, ``[n]``, differentiable; ``step`` decides what a whole batch shares."""

    def validate(self, process: int, processes: int) -> dict[str, float]:
        """Measures on held-out data; empty without such data.

        The first decides which weights are best, the next only where it does not. More is better, but of a ``loss``.
        Every process calls it for its share, and each gets the measures of all.
        """

    def save(self, directory: Path, weights: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Write the checkpoint of ``weights`` (all that learn, and buffers), file by file."""


def train(
    learner: Learner,
    arguments: TrainingArguments,
    identity: Mapping[str, Any],
    out: Path,
    accelerator: Accelerator,
) -> Progress:
    """Train ``learner``, from where an earlier run with the same arguments stopped, and write ``out``.

    Args:
        identity: everything else that decides the result, by name: model, data, form.
        out: gets what the learner saves (of the best validation, or of the last step without one), the curves and
            ``training.json``; ``last/`` holds the last step's weights where others were better; ``trainer_state/`` is
            there until the run is finished.

    Returns:
        The whole run, also if it was finished before.

    Raises:
        InputError: ``out`` holds another run or something else, or the loss is no longer a number.
        KeyboardInterrupt: the user stopped it; everything is saved.
    """
    run = _Run(learner, arguments, out, accelerator)
    identity = {**identity, "processes": accelerator.num_processes}
    if (finished := finished_run(out, identity)) is not None:
        return finished
    with torch.random.fork_rng():
        return run.finish(run.optimise(identity))


def finished_run(out: Path, identity: Mapping[str, Any]) -> Progress | None:
    """The run that ``out`` holds, if it is this one and finished; None if it is unfinished or ``out`` is empty.

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
    mine, theirs = json.loads(json.dumps(identity)), progress.arguments
    if different := sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name)):
        changes = "; ".join(f"{name} was {theirs.get(name)}, is {mine.get(name)}" for name in different)
        raise InputError(f"{out}: holds a run with other arguments ({changes}); give another --out or delete it")
    return progress if (out / RECORD).is_file() else None


def is_finished(out: Path) -> bool:
    """Whether ``out`` holds a finished run, whichever."""
    return (out / RECORD).is_file()


def _read_record(path: Path) -> Progress:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        record["losses"] = [tuple(row) for row in record["losses"]]
        return Progress(**record)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not the record of a training run; give another directory") from error


class _Run:
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
        if accelerator.num_processes > 1:
            learner.module, prepared = accelerator.prepare(learner.module, optimizer)
            self.optimizer = prepared.optimizer
            self.weights = [weight for weight in learner.module.parameters() if weight.requires_grad]

    def optimise(self, identity: Mapping[str, Any]) -> Progress:
        """Take the steps that are left."""
        progress = Progress(dict(identity))
        if (saved := find_state(self.out / STATE)) is not None:
            progress = read_progress(saved)
            load_state(saved, self.learner.module, self.optimizer)
        hidden = not self.accelerator.is_main_process
        bar = tqdm(
            desc=f"Training the {self.learner.name}",
            total=self.steps,
            initial=progress.step,
            unit="step",
            disable=hidden,
        )
        with bar, _deferred_interrupt() as asked_to_stop:
            if progress.step == 0 or self._unvalidated(progress):
                self._validate(progress)
            while progress.step < self.steps:
                loss, stop = self._step(progress.step, asked_to_stop)
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
                    raise KeyboardInterrupt(self._saved(progress))
        return progress

    def _due(self, step: int) -> bool:
        """Whether there is a validation after this step."""
        return step == self.steps or step % (self.arguments.validate_every or self.steps) == 0

    def _unvalidated(self, progress: Progress) -> bool:
        """Whether the validation of the last step was interrupted."""
        steps = [validation["step"] for validation in progress.validations]
        return bool(steps) and self._due(progress.step) and progress.step not in steps

    def _saved(self, progress: Progress) -> str:
        return f"saved at step {progress.step} of {self.steps} in {self.out}; the same command goes on"

    def _step(self, step: int, asked_to_stop: Callable[[], bool]) -> tuple[float, bool]:
        """One optimizer step: the mean loss of its batch, and whether any process was asked to stop."""
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        size = self.arguments.batch_size
        batch = batch_at(step, self.learner.examples, size * processes, self.arguments.seed)
        share = -(-len(batch) // processes)
        micro = min(self.arguments.micro_batch_size or size, share)
        mine = batch[rank::processes]
        # Every process makes as many passes as any, or the others would wait for it: what it lacks weighs nothing.
        weights = [1 / len(batch)] * len(mine) + [0.0] * (share - len(mine))
        mine = mine + [batch[0]] * (share - len(mine))
        torch.manual_seed(_number(self.arguments.seed, step, rank))
        rate = self.arguments.rate_at(step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.learner.module.train()
        total = 0.0
        for start in range(0, share, micro):
            with self._synchronised(start + micro >= share), self._precision():
                losses = self.learner.losses(mine[start : start + micro], step)
                loss = (losses * torch.tensor(weights[start : start + micro], device=losses.device)).sum()
                # Gradients are averaged over processes, so each counts as often as there are processes.
                self.accelerator.backward(loss * processes)
            total += loss.item()
        told = torch.tensor([total, float(asked_to_stop())], dtype=torch.float64, device=self.device)
        if processes > 1:
            told = self.accelerator.reduce(told, "sum")
        self.accelerator.clip_grad_norm_(self.weights, self.arguments.max_gradient_norm)
        if math.isfinite(told[0].item()):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return told[0].item(), told[1].item() > 0

    @contextmanager
    def _synchronised(self, last: bool) -> Iterator[None]:
        """Gradients travel between processes once a step, with the last of its passes."""
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
        """Measure, unless that was done before this run was stopped.

        Raises:
            KeyboardInterrupt: the user stopped it; everything but this validation is saved.
        """
        if progress.step in [validation["step"] for validation in progress.validations]:
            return
        self.learner.module.eval()
        alone = self.accelerator.num_processes == 1
        try:
            # It changes nothing, so that it need not wait. Several processes wait for each other all the same.
            with torch.no_grad(), _immediate_interrupt() if alone else nullcontext():
                measures = self.learner.validate(self.accelerator.process_index, self.accelerator.num_processes)
        except KeyboardInterrupt:
            if not alone:
                raise
            if not progress.step:
                raise KeyboardInterrupt("stopped before the first step; the same command begins again") from None
            self._save(progress)
            raise KeyboardInterrupt(self._saved(progress)) from None
        if not measures:
            return
        earlier = [_quality(validation) for validation in progress.validations[1:]]
        progress.validations.append({"step": progress.step, **measures})
        if progress.step and all(_quality(measures) > quality for quality in earlier):
            progress.best = progress.step
            weights, _ = full_state(self.learner.module, self.optimizer)
            if self.accelerator.is_main_process:
                (self.out / STATE).mkdir(parents=True, exist_ok=True)
                with atomic_file(self.out / STATE / BEST) as temporary:
                    save_file(weights, temporary)

    def _save(self, progress: Progress) -> None:
        weights, states = full_state(self.learner.module, self.optimizer)
        if self.accelerator.is_main_process:
            save_state(self.out / STATE, weights, states, progress)
        self.accelerator.wait_for_everyone()

    def finish(self, progress: Progress) -> Progress:
        """Write what the run is for, and last of all that it is finished."""
        weights, _ = full_state(self.learner.module, self.optimizer)
        if self.accelerator.is_main_process:
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


def _quality(measures: Mapping[str, float]) -> tuple[float, ...]:
    """What is the greater, the better the weights."""
    return tuple(-value if name == "loss" else value for name, value in measures.items() if name != "step")


def _number(*parts: object) -> int:
    """A seed that depends on all of ``parts``."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


@contextmanager
def _immediate_interrupt() -> Iterator[None]:
    """Let Ctrl-C stop what is running, also where `_deferred_interrupt` would have it wait."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, earlier)


@contextmanager
def _deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Let Ctrl-C wait for the end of a step, so that what is saved is whole; a second one does not wait.

    Yields a function that says whether it was pressed.
    """
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield pressed.is_set
        return
    earlier = signal.getsignal(signal.SIGINT)

    def press(number: int, frame: Any) -> None:
        pressed.set()
        signal.signal(signal.SIGINT, earlier)

    signal.signal(signal.SIGINT, press)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, earlier)
