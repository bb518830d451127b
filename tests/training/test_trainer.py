"""The loop: what it computes, by hand; and that a run which was stopped anywhere ends as if it had not been."""

from __future__ import annotations

import csv
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from genpoe_plugin.errors import InputError
from genpoe_plugin.training import trainer, trainer_state
from genpoe_plugin.training.devices import accelerator_on
from genpoe_plugin.training.draws import Draw, batch_at, steps_per_epoch
from genpoe_plugin.training.trainer import RECORD, STATE, train
from genpoe_plugin.training.trainer_state import Progress
from genpoe_plugin.training.training_arguments import TrainingArguments

INPUTS = torch.randn(7, 3, generator=torch.Generator().manual_seed(1))
TARGETS = torch.randn(7, generator=torch.Generator().manual_seed(2))


class Regression:
    """Least squares with dropout, so that a step also depends on random numbers."""

    name = "line"
    examples = 7

    def __init__(self, measures: Sequence[float] = ()) -> None:
        torch.manual_seed(0)
        self.module: nn.Module = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1))
        self.measures = list(measures)
        self.before_step: Callable[[int], None] = lambda step: None

    def losses(self, draws: Sequence[Draw], step: int) -> Tensor:
        self.before_step(step)
        chosen = [draw.example for draw in draws]
        return (self.module(INPUTS[chosen]).squeeze(1) - TARGETS[chosen]) ** 2

    def validate(self, process: int, processes: int) -> dict[str, float]:
        return {"score": self.measures.pop(0)} if self.measures else {}

    def save(self, directory: Path, weights: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        save_file(dict(weights), directory / "model.safetensors")
        (directory / "step").write_text(str(record["step"]))


def arguments(**changes: Any) -> TrainingArguments:
    return TrainingArguments(**{"epochs": 5, "batch_size": 3, "learning_rate": 0.01, "save_every": 4, **changes})


def run(learner: Regression, out: Path, settings: TrainingArguments | None = None, **identity: Any) -> Progress:
    settings = settings or arguments()
    return train(learner, settings, {**vars(settings), **identity}, out, accelerator_on("cpu"))


def weights(out: Path) -> dict[str, Tensor]:
    return load_file(out / "model.safetensors")


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_every_epoch_uses_every_example_once_in_another_order() -> None:
    assert steps_per_epoch(7, 3) == 3
    epochs = [[draw for step in range(3 * e, 3 * e + 3) for draw in batch_at(step, 7, 3, 0)] for e in range(4)]
    assert all(sorted(draw.example for draw in epoch) == list(range(7)) for epoch in epochs)
    assert all({draw.epoch for draw in epoch} == {number} for number, epoch in enumerate(epochs))
    assert len({tuple(draw.example for draw in epoch) for epoch in epochs}) == 4
    assert batch_at(1, 7, 3, 0) == epochs[0][3:6] != batch_at(1, 7, 3, 1)


def test_draws_are_random_by_seed_purpose_epoch_and_example_alone() -> None:
    drawn = [
        draw.rng(seed, purpose).random()
        for seed in (0, 1)
        for purpose in ("a", "b")
        for draw in (Draw(0, 1), Draw(1, 0), Draw(1, 1))
    ]
    assert len(set(drawn)) == len(drawn)
    assert Draw(1, 1).rng(1, "b").random() == drawn[-1]


def test_the_rate_rises_and_falls_to_its_share() -> None:
    settings = arguments(learning_rate=1.0, warmup_ratio=0.1, final_rate=0.01)
    rates = [settings.rate_at(step, 100) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates[100] == pytest.approx(0.01)
    assert rates[55] == pytest.approx(0.505)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_it_is_adamw_on_the_mean_loss_with_clipped_gradients(tmp_path: Path) -> None:
    """Against the same in plain torch, in float64 and without dropout."""
    settings = arguments(max_gradient_norm=0.5, weight_decay=0.1)
    learner = Regression()
    learner.module[1] = nn.Identity()
    model = nn.Sequential(nn.Linear(3, 4), nn.Identity(), nn.Linear(4, 1))
    model.load_state_dict(learner.module.state_dict())
    progress = run(learner, tmp_path / "out", settings)
    model.double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    for step in range(15):
        chosen = [draw.example for draw in batch_at(step, 7, 3, 0)]
        loss = ((model(INPUTS[chosen].double()).squeeze(1) - TARGETS[chosen].double()) ** 2).mean()
        optimizer.param_groups[0]["lr"] = settings.rate_at(step, 15)
        optimizer.zero_grad()
        loss.backward()
        norm = sum(parameter.grad.square().sum() for parameter in model.parameters()) ** 0.5
        if norm > 0.5:
            for parameter in model.parameters():
                parameter.grad *= 0.5 / norm
        optimizer.step()
        assert progress.losses[step] == pytest.approx((step + 1, loss.item(), settings.rate_at(step, 15)), rel=1e-4)
    for name, tensor in weights(tmp_path / "out").items():
        torch.testing.assert_close(tensor.double(), model.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_micro_batches_do_not_change_the_result(tmp_path: Path) -> None:
    for micro in (1, 2, 3):
        learner = Regression()
        learner.module[1] = nn.Identity()
        run(learner, tmp_path / str(micro), arguments(micro_batch_size=micro))
    for micro in (1, 2):
        for name, tensor in weights(tmp_path / str(micro)).items():
            torch.testing.assert_close(tensor, weights(tmp_path / "3")[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("where", ["step 0", "step 2", "step 9", "writing weights", "writing progress", "renaming"])
def test_a_killed_run_goes_on_to_the_same_weights_bit_for_bit(tmp_path: Path, where: str) -> None:
    """SIGKILL in a step, in the midst of the second saving, and between its writing and its renaming."""
    run(Regression(), tmp_path / "whole")
    kill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
    out = tmp_path / "killed"
    if (child := os.fork()) == 0:
        learner = Regression()
        saved: list[Path] = []

        def write(tensors: dict[str, Tensor], path: Path) -> None:
            saved.append(path)
            if where == "writing weights" and len(saved) == 3:
                path.write_bytes(b"half")
                kill()
            save_file(tensors, path)

        class Wary(type(Path())):  # type: ignore[misc]
            """A path that dies where the test says."""

            def write_text(self, text: str, **options: Any) -> int:
                if where == "writing progress" and len(saved) == 4:
                    super().write_text(text[:20])
                    kill()
                return super().write_text(text, **options)

            def rename(self, target: Any) -> Any:
                if where == "renaming" and len(saved) == 4:
                    kill()
                return super().rename(target)

        if where.startswith("step"):
            learner.before_step = lambda step: kill() if step == int(where[5:]) else None
        trainer_state.save_file = write
        run(learner, Wary(out))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert not (out / RECORD).exists()
    progress = run(Regression(), out)
    assert same(weights(out), weights(tmp_path / "whole"))
    assert (out / RECORD).read_text() == (tmp_path / "whole" / RECORD).read_text()
    assert progress.step == 15 and not (out / STATE).exists()
    assert {path.name for path in out.iterdir()} == {path.name for path in (tmp_path / "whole").iterdir()}


def test_a_killed_run_does_not_begin_again(tmp_path: Path) -> None:
    learner = Regression()

    def fail(step: int) -> None:
        if step == 9:
            raise ZeroDivisionError

    learner.before_step = fail
    with pytest.raises(ZeroDivisionError):
        run(learner, tmp_path)
    steps: list[int] = []
    again = Regression()
    again.before_step = steps.append
    run(again, tmp_path)
    assert steps == list(range(8, 15))


def interrupt_then_wait() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(30)  # what Ctrl-C must not wait for


class Backward(torch.autograd.Function):
    """The identity, whose backward pass calls a function."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, call: Callable[[], None]) -> Tensor:
        ctx.call = call
        return inputs.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.call()
        return gradients[0], None


class InPass(Regression):
    """Calls a function in a forward or backward pass of step 6."""

    def __init__(self, call: Callable[[], None], where: str) -> None:
        super().__init__()
        self.call, self.where = call, where

    def losses(self, draws: Sequence[Draw], step: int) -> Tensor:
        losses = super().losses(draws, step)
        if step == 5 and self.where == "forward":
            self.call()
        return Backward.apply(losses, self.call) if step == 5 and self.where == "backward" else losses


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_ctrl_c_in_a_step_stops_at_once_and_says_how_to_resume(tmp_path: Path, where: str) -> None:
    run(Regression(), tmp_path / "whole")
    out = tmp_path / "stopped"
    handler = signal.getsignal(signal.SIGINT)
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt, match=r"saved at step 5 of 15 in .*; rerun the same command to resume"):
        run(InPass(interrupt_then_wait, where), out)
    assert time.monotonic() - begin < 10 and signal.getsignal(signal.SIGINT) is handler
    steps: list[int] = []
    again = Regression()
    again.before_step = steps.append
    run(again, out)
    assert steps == list(range(5, 15))
    assert same(weights(out), weights(tmp_path / "whole"))


def test_ctrl_c_in_the_first_step_leaves_nothing(tmp_path: Path) -> None:
    learner = Regression()
    learner.before_step = lambda step: interrupt_then_wait()
    with pytest.raises(KeyboardInterrupt, match="stopped before the first step; rerun the same command to start"):
        run(learner, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_ctrl_c_right_after_a_save_does_not_save_the_same_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is killed while it replaces its only state would lose it."""
    saved: list[int] = []
    save_state = trainer.save_state

    def save(directory: Path, weights: Any, states: Any, progress: Progress) -> None:
        saved.append(progress.step)
        save_state(directory, weights, states, progress)

    monkeypatch.setattr(trainer, "save_state", save)
    with pytest.raises(KeyboardInterrupt, match="saved at step 5 of 15"):
        run(InPass(interrupt_then_wait, "forward"), tmp_path, arguments(save_every=5))
    with pytest.raises(KeyboardInterrupt, match="saved at step 5 of 15"):  # in the first step after resuming
        run(InPass(interrupt_then_wait, "backward"), tmp_path, arguments(save_every=5))
    assert saved == [5]


def test_ctrl_c_that_is_ignored_stays_ignored(tmp_path: Path) -> None:
    """As in a job that a shell has started in the background."""
    earlier = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        run(InPass(lambda: os.kill(os.getpid(), signal.SIGINT), "forward"), tmp_path)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, earlier)


class Deep(Regression):
    """Sixty layers, whose backward pass takes long enough to press Ctrl-C in it."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Sequential(*(nn.Linear(256, 256) for _ in range(60)))

    def losses(self, draws: Sequence[Draw], step: int) -> Tensor:
        losses = self.module(torch.randn(2048, 256))[: len(draws)].mean(1)
        threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGINT)).start()
        return losses


def test_ctrl_c_in_a_long_backward_pass_does_not_wait_for_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, unfinished = Deep(), []
    zero_grad = torch.optim.AdamW.zero_grad

    def record(self: torch.optim.AdamW, **arguments: Any) -> None:
        unfinished.append(next(learner.module.parameters()).grad is None)
        zero_grad(self, **arguments)

    monkeypatch.setattr(torch.optim.AdamW, "zero_grad", record)
    with pytest.raises(KeyboardInterrupt, match="stopped before the first step"):
        run(learner, tmp_path / "out")
    assert unfinished == [True]


def test_ctrl_c_in_the_optimizer_waits_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the weights must not be saved with the other half of the step before."""
    run(Regression(), tmp_path / "whole")
    step = torch.optim.AdamW.step
    calls: list[int] = []

    def interrupted(self: torch.optim.AdamW, *arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupted)
    with pytest.raises(KeyboardInterrupt, match="saved at step 6 of 15"):
        run(Regression(), tmp_path / "stopped")
    run(Regression(), tmp_path / "stopped")
    assert same(weights(tmp_path / "stopped"), weights(tmp_path / "whole"))


class Validated(Regression):
    """Measures its own weights; Ctrl-C is pressed in the validation of some steps."""

    def __init__(self, interrupted: Sequence[int] = ()) -> None:
        super().__init__()
        self.interrupted, self.done = list(interrupted), 0
        self.validated: list[int] = []

    def losses(self, draws: Sequence[Draw], step: int) -> Tensor:
        self.done = step + 1
        return super().losses(draws, step)

    def validate(self, process: int, processes: int) -> dict[str, float]:
        if self.done in self.interrupted:
            interrupt_then_wait()
        self.validated.append(self.done)
        return {"score": float(self.module[0].weight.sum())}


@pytest.mark.parametrize("step", [0, 6, 15])
def test_ctrl_c_in_a_validation_stops_at_once_and_the_validation_is_made_up_for(tmp_path: Path, step: int) -> None:
    settings = arguments(validate_every=3)
    whole = run(Validated(), tmp_path / "whole", settings)
    handler = signal.getsignal(signal.SIGINT)
    begin = time.monotonic()
    said = (
        f"saved at step {step} of 15 in .*; rerun the same command to resume"
        if step
        else "before the first step; rerun the same"
    )
    with pytest.raises(KeyboardInterrupt, match=said):
        run(Validated([step]), tmp_path / "stopped", settings)
    assert time.monotonic() - begin < 10 and signal.getsignal(signal.SIGINT) is handler
    again = Validated()
    again.done = step
    assert run(again, tmp_path / "stopped", settings) == whole
    assert again.validated == list(range(step, 16, 3))
    assert same(weights(tmp_path / "stopped"), weights(tmp_path / "whole"))


def test_ctrl_c_in_a_step_leaves_its_validation_for_later(tmp_path: Path) -> None:
    settings = arguments(validate_every=3)
    whole = run(Validated(), tmp_path / "whole", settings)
    learner = Validated()
    learner.before_step = lambda step: os.kill(os.getpid(), signal.SIGINT) if step == 5 else None
    with pytest.raises(KeyboardInterrupt, match="saved at step 5 of 15"):
        run(learner, tmp_path / "stopped", settings)
    assert learner.validated == [0, 3]
    again = Validated()
    again.done = 5
    assert run(again, tmp_path / "stopped", settings) == whole


def test_changed_arguments_are_named(tmp_path: Path) -> None:
    learner = Regression()
    learner.before_step = lambda step: os.kill(os.getpid(), signal.SIGINT) if step == 5 else None
    with pytest.raises(KeyboardInterrupt):
        run(learner, tmp_path, data="abc")
    message = r"holds a run with other arguments \(data was abc, is xyz; seed was 0, is 1\); give another --out"
    for _ in range(2):
        with pytest.raises(InputError, match=message):
            run(Regression(), tmp_path, arguments(seed=1), data="xyz")
        run(Regression(), tmp_path, data="abc")


def test_a_finished_run_is_left_alone(tmp_path: Path) -> None:
    first = run(Regression(), tmp_path)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    learner = Regression()
    learner.before_step = lambda step: pytest.fail("trained again")
    assert run(learner, tmp_path) == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == times


def test_nothing_else_is_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("all of it")
    with pytest.raises(InputError, match="holds something that is not a training run"):
        run(Regression(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(("measures", "best"), [([0.1, 0.5, 0.9, 0.3], 10), ([0.9, 0.1, 0.2, 0.3], 15)])
def test_the_best_weights_are_kept_and_the_last(tmp_path: Path, measures: list[float], best: int) -> None:
    progress = run(Regression(measures), tmp_path / "out", arguments(validate_every=5))
    assert progress.validations == [{"step": 5 * n, "score": measure} for n, measure in enumerate(measures)]
    assert progress.best == best and (tmp_path / "out" / "step").read_text() == str(best)
    run(Regression(), tmp_path / "plain")
    last = tmp_path / "out" / "last" if best != 15 else tmp_path / "out"
    assert same(weights(last), weights(tmp_path / "plain"))
    assert (tmp_path / "out" / "last").exists() == (best != 15)
    assert same(weights(tmp_path / "out"), weights(tmp_path / "plain")) == (best == 15)


def test_the_next_measure_decides_where_the_first_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = [9.0, 3.0, 1.0, 2.0]
    monkeypatch.setattr(Regression, "validate", lambda *_: {"score": 0.0, "loss": losses.pop(0)})
    assert run(Regression(), tmp_path, arguments(validate_every=5)).best == 10


def test_the_best_of_a_killed_run_is_not_lost(tmp_path: Path) -> None:
    measures = [0.1, 0.9, 0.3, 0.2]
    run(Regression(measures), tmp_path / "whole", arguments(validate_every=5))
    learner = Regression(measures)
    learner.before_step = lambda step: os.kill(os.getpid(), signal.SIGINT) if step == 7 else None
    with pytest.raises(KeyboardInterrupt):
        run(learner, tmp_path / "killed", arguments(validate_every=5))
    run(Regression(measures[2:]), tmp_path / "killed", arguments(validate_every=5))
    assert same(weights(tmp_path / "killed"), weights(tmp_path / "whole"))
    assert (tmp_path / "killed" / RECORD).read_text() == (tmp_path / "whole" / RECORD).read_text()


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path) -> None:
    learner = Regression()

    def spoil(step: int) -> None:
        if step == 2:
            with torch.no_grad():
                learner.module[0].weight.fill_(torch.nan)

    learner.before_step = spoil
    with pytest.raises(InputError, match="the loss at step 3 is nan; try a lower learning rate"):
        run(learner, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_curves_and_the_record_are_of_the_run(tmp_path: Path) -> None:
    progress = run(Regression([0.0, 0.5, 0.7, 0.6]), tmp_path, arguments(validate_every=5))
    with (tmp_path / "loss.csv").open() as file:
        rows = [(int(row["step"]), float(row["loss"]), float(row["learning_rate"])) for row in csv.DictReader(file)]
    assert rows == progress.losses
    record = json.loads((tmp_path / RECORD).read_text())
    assert (record["step"], record["best"], record["arguments"]["learning_rate"]) == (15, 10, 0.01)


@pytest.mark.parametrize("file", ["weights.safetensors", "optimizer.safetensors", "progress.json"])
def test_a_damaged_state_is_one_line(tmp_path: Path, file: str) -> None:
    learner = Regression()
    learner.before_step = lambda step: os.kill(os.getpid(), signal.SIGINT) if step == 5 else None
    with pytest.raises(KeyboardInterrupt):
        run(learner, tmp_path)
    (saved,) = (tmp_path / STATE).glob("step-*")
    (saved / file).write_bytes((saved / file).read_bytes()[:40])
    with pytest.raises(InputError, match="damaged") as error:
        run(Regression(), tmp_path)
    assert str(saved) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("max_steps", 0),
        ("batch_size", -1),
        ("micro_batch_size", 0),
        ("learning_rate", 0.0),
        ("warmup_ratio", 1.0),
        ("precision", "float8"),
        ("validate_every", 0),
        ("save_every", 0),
    ],
)
def test_wrong_arguments_are_named(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"^{name} is {value}; it must be"):
        arguments(**{name: value})
