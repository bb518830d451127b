"""Faults: commands are killed or interrupted at random moments, and run again.

A killed command is run again to its end (it may be killed several times before), and what it leaves behind is compared
with that of an undisturbed run. An interrupted command has to end in time, with one line.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import click

from benchmarks.fault_commands import COMMANDS, Command, left_behind, make_world
from benchmarks.forked import Forked, prepared
from benchmarks.row import Row, missed, table, write

MOST_KILLS = 3  # of one command, before it is run to its end
INTERRUPT_SECONDS = 2.0
STARTED = 0.1  # seconds; an interrupt before is one of the benchmark
LIMIT = 300  # seconds, after which a command counts as hanging
ENDED_BY_INTERRUPT = (130, -signal.SIGINT)


@click.command()
@click.option("--kills", default=20, show_default=True, type=click.IntRange(0), help="SIGKILLs in all.")
@click.option("--interrupts", default=18, show_default=True, type=click.IntRange(0), help="SIGINTs in all.")
@click.option("--seed", default=0, show_default=True, help="Seed of the moments.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write rows, machine and command here.")
@click.pass_context
def faults(ctx: click.Context, kills: int, interrupts: int, seed: int, path: Path | None) -> None:
    """Kill and interrupt commands at random moments, run them again, and compare what they leave behind.

    The exit status is 1 if something is lost or different, or an interrupt is wrong or slow.
    """
    with tempfile.TemporaryDirectory() as folder, working_in(Path(folder)):
        rows = measure(COMMANDS, kills, interrupts, seed)
    click.echo(table(rows))
    if path is not None:
        write(rows, path)
        click.echo(f"rows: {path}")
    ctx.exit(1 if missed(rows) else 0)


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """Work in ``folder``, with the offline hub and one thread."""
    before, environment = Path.cwd(), dict(os.environ)
    # Kills leave no threads behind, and one thread gives the same numbers in every run.
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
        os.environ.clear()
        os.environ |= environment


@dataclass
class Tally:
    """What happened to the commands.

    Attributes:
        kills: the number of kills.
        lost: runs after kills that ended with an error, with the last line of their output.
        different: runs after kills that left something else than an undisturbed run, with the first such file.
        interrupts: the seconds that each interrupted command took to end.
        wrong: interrupted commands that ended with another status than 130, or with a traceback.
    """

    kills: int = 0
    lost: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)
    interrupts: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def measure(commands: Sequence[Command], kills: int, interrupts: int, seed: int = 0) -> list[Row]:
    """Disturb the commands in turn, in the working directory.

    Raises:
        RuntimeError: a command fails undisturbed.
    """
    with prepared():
        tally = _disturb(commands, kills, interrupts, seed)
    for problem in (*tally.lost, *tally.different, *tally.wrong):
        click.echo(problem, err=True)
    slow = [interrupt for interrupt in tally.interrupts if interrupt > INTERRUPT_SECONDS]
    return [
        Row("faults.kills", tally.kills, "kills"),
        Row("faults.lost", len(tally.lost), "runs", "<= 0"),
        Row("faults.different", len(tally.different), "runs", "<= 0"),
        Row("faults.interrupts", len(tally.interrupts), "interrupts"),
        Row("faults.slow_interrupts", len(slow), "interrupts", "<= 0"),
        Row("faults.wrong_interrupts", len(tally.wrong), "interrupts", "<= 0"),
        Row("faults.slowest_interrupt", max(tally.interrupts, default=0.0), "s"),
    ]


def _disturb(commands: Sequence[Command], kills: int, interrupts: int, seed: int) -> Tally:
    log = Path("log")
    if Forked(lambda: make_world(Path()), log).wait(LIMIT):
        raise RuntimeError(f"the models and data cannot be made: {_last_line(log)}")
    rng, tally = random.Random(seed), Tally()
    expected, seconds = {}, {}
    for command in commands:
        begin = time.monotonic()
        if (status := _start(command).wait(LIMIT)) != 0:
            raise RuntimeError(f"{command.name}: exit status {status}: {log.read_text()}")
        seconds[command], expected[command] = time.monotonic() - begin, left_behind(Path("out"))
    number = 0
    while tally.kills < kills:
        command = commands[number % len(commands)]
        _kill(command, expected[command], seconds[command], min(MOST_KILLS, kills - tally.kills), rng, tally)
        number += 1
    number = 0
    while len(tally.interrupts) < interrupts:
        command = commands[number % len(commands)]
        _interrupt(command, seconds[command], rng, tally)
        number += 1
    return tally


def _start(command: Command, fresh: bool = True) -> Forked:
    """Start a command, by default without what earlier ones have left."""
    if fresh:
        shutil.rmtree("out", ignore_errors=True)
        Path("out").mkdir()
    Path("log").unlink(missing_ok=True)
    return Forked(command.run, Path("log"))


def _kill(
    command: Command, expected: dict[str, object], seconds: float, most: int, rng: random.Random, tally: Tally
) -> None:
    moments = []
    for trial in range(rng.randint(1, most)):
        moment = rng.uniform(0, seconds)
        running = _start(command, fresh=trial == 0)
        if running.wait(moment) is not None:
            break
        # A terminal that closes kills all processes; the system's OOM killer kills one.
        (running.signal_all if rng.random() < 0.5 else running.signal)(signal.SIGKILL)
        running.wait()
        moments.append(f"{moment:.2f}")
        tally.kills += 1
    where = f"{command.name}, killed after {' s, '.join(moments)} s"
    running = _start(command, fresh=not moments)
    status = running.wait(LIMIT)
    if status != 0:
        if status is None:
            running.signal_all(signal.SIGKILL)
            running.wait()
        tally.lost.append(f"{where}: exit status {status}: {_last_line(running.log)}")
        return
    found = left_behind(Path("out"))
    if wrong := [name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)]:
        tally.different.append(f"{where}: {', '.join(sorted(wrong))}")


def _interrupt(command: Command, seconds: float, rng: random.Random, tally: Tally) -> None:
    moment = STARTED + rng.uniform(0, seconds)
    running = _start(command)
    if running.wait(moment) is not None:
        return
    begin = time.monotonic()
    running.signal_all(signal.SIGINT)
    status = running.wait(LIMIT)
    tally.interrupts.append(time.monotonic() - begin)
    output = running.log.read_text()
    if status == 0:
        return  # it ended just before
    where = f"{command.name}, interrupted after {moment:.2f} s"
    if status not in ENDED_BY_INTERRUPT or "Traceback" in output:
        tally.wrong.append(f"{where}: exit status {status}: {_last_line(running.log)}")
    elif tally.interrupts[-1] > INTERRUPT_SECONDS:
        tally.wrong.append(f"{where}: took {tally.interrupts[-1]:.1f} s")


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "no output"
