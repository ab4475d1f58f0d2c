"""Runs side by side: a process a run, on a device that is free; or one after another in this process."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection, get_context, parent_process
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, cast

import torch

from headstart import checkpoint
from headstart.console import notes
from headstart.errors import HeadstartError, RunError, SettingsError
from headstart.files import read_json
from headstart.proposals import ProposalSettings
from headstart.runs import DETECTOR_FILE, RECORD, usable_cores
from headstart.verbs.compare.plan import Task
from headstart.verbs.finetune import finetune
from headstart.verbs.pretrain import pretrain
from headstart.verbs.propose import propose

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FAILED, STOPPED = 1, 3  # exit codes of a process that ran a task
LOGS = "logs"
COMMAND_LOCK, RUNS_LOCK = ".command.lock", ".runs.lock"  # in the comparison's folder
BEGUN = "-- begun"  # before what each try of a task says in its log
TAIL = 6  # lines of it that an error repeats


def slots(device: str | None, jobs: int | None) -> list[str | None]:
    """A device for each run at a time: all CUDA devices in turn, or the CPU ``jobs`` times.

    Raises:
        SettingsError: ``jobs`` is less than 1.
    """
    if jobs is not None and jobs < 1:
        raise SettingsError(f"--jobs {jobs}: expected 1 or more")
    if device in (None, "auto", "cuda") and torch.cuda.is_available():
        devices = torch.cuda.device_count()
        return [f"cuda:{i % devices}" for i in range(jobs or devices)]
    return [device] * (jobs or 1)


def finished(task: Task) -> bool:
    """Whether nothing is left to do; a fine-tuning run that was killed while it was evaluated is not."""
    if task.verb == "propose":
        return task.out.is_file()
    if not (task.out / RECORD).is_file():
        return False
    last = task.out / (DETECTOR_FILE if task.verb == "pretrain" else "eval.json")
    return last.is_file() and read_json(task.out / RECORD).get("status") == "finished"


def work(task: Task, device: str | None, show: bool) -> bool:
    """Do it, or go on with it; False when it was asked to stop before its end."""
    if task.verb == "propose":
        settings = ProposalSettings.model_validate(task.arguments["settings"])
        propose(task.arguments["images"], task.out, settings=settings, progress=show)
        return True
    verb: Callable[..., Any] = pretrain if task.verb == "pretrain" else finetune
    resume = (task.out / RECORD).is_file()
    done = verb(**task.arguments, out=task.out, device=device, resume=resume, show=show)
    return bool(done.summary.finished)


def run_all(
    tasks: Sequence[Task], places: Sequence[str | None], logs: Path, show: bool, after: Callable[[Task], None]
) -> bool:
    """Run what is not finished, each task after those it needs; ``after`` each. False when it was asked to stop.

    Raises:
        HeadstartError: one failed; those beside it are asked to stop first, with a checkpoint.
    """
    left = [task for task in tasks if not finished(task)]
    done = {task.name for task in tasks} - {task.name for task in left}
    if len(places) > 1 and len(left) > 1:
        with _terminated_is_interrupted():
            return _side_by_side(left, done, places, logs, show, after)
    try:
        while left:  # in the order of the list, where what is needed comes first
            task = left.pop(0)
            if show:
                notes.print(f"\n{task.verb} {task.name} ({len(left)} after it)", markup=False)
            if not work(task, places[0], show):
                return False
            _tidy(task)
            after(task)
    except KeyboardInterrupt:  # between the steps of training, which take it themselves
        notes.print("stopped; the same command goes on")
        return False
    return True


def _tidy(task: Task) -> None:
    """Nobody goes on from the checkpoints of a fine-tuning run that is done, most of what it leaves on the disk."""
    if task.verb == "finetune" and finished(task):
        checkpoint.clear(task.out)


@contextlib.contextmanager
def alone(out: Path) -> Iterator[None]:
    """``out`` for this command only, and not before runs of one that was killed have ended.

    Raises:
        RunError: another command works there.
    """
    out.mkdir(parents=True, exist_ok=True)
    with _locked(out / COMMAND_LOCK, wait=False) as free:
        if not free:
            raise RunError(f"{out}: another headstart compare works in it; wait for its end, or choose another --out")
        with _locked(out / RUNS_LOCK):
            pass
        yield


@contextlib.contextmanager
def _locked(file: Path, wait: bool = True, shared: bool = False) -> Iterator[bool]:
    """Whether the lock was free, or waited for. It ends with its process, however that ends."""
    with open(file, "a") as handle:
        if fcntl is not None:
            try:
                fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            except OSError:  # a file system without locks: as on a system without
                pass
        yield True


def _side_by_side(
    left: list[Task],
    done: set[str],
    places: Sequence[str | None],
    logs: Path,
    show: bool,
    after: Callable[[Task], None],
) -> bool:
    context = get_context("spawn")  # CUDA does not survive a fork
    threads = max(1, usable_cores() // len(places))
    free = list(places)
    at_work: dict[int, tuple[BaseProcess, Task, str | None]] = {}
    total, begun = len(left), time.monotonic()
    logs.mkdir(parents=True, exist_ok=True)
    try:
        while left or at_work:
            for task in [task for task in left if done.issuperset(task.needs)][: len(free)]:
                left.remove(task)
                place = free.pop(0)
                arguments = (task, place, threads, logs / f"{task.name}.txt")
                process: BaseProcess = context.Process(target=_in_process, args=arguments, name=task.name)
                process.start()
                at_work[process.sentinel] = (process, task, place)
            for sentinel in connection.wait(list(at_work)):
                ended, task, place = at_work.pop(cast(int, sentinel))
                ended.join()
                free.append(place)
                if ended.exitcode == STOPPED:
                    return False
                if ended.exitcode or not finished(task):
                    raise RunError(f"{task.name}: {_last_words(logs / f'{task.name}.txt', ended.exitcode)}")
                done.add(task.name)
                _tidy(task)
                after(task)
                if show:
                    seconds = time.monotonic() - begun
                    count = total - len(left) - len(at_work)
                    notes.print(f"{count}/{total} done after {seconds:.0f}s: {task.name}", markup=False)
        return True
    except KeyboardInterrupt:
        notes.print("stopping: the runs at work write a checkpoint; the same command goes on")
        return False
    finally:
        for one, _, _ in at_work.values():
            one.terminate()  # a request, as the engine takes it: it stops after the step
        try:
            for one, _, _ in at_work.values():
                one.join()
        except KeyboardInterrupt:  # again: at once, from the last checkpoint then
            for one, _, _ in at_work.values():
                one.kill()


def _in_process(task: Task, device: str | None, threads: int, log: Path) -> None:
    """What a child does: all that it says goes to ``log``."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    if device is None or device == "cpu":
        torch.set_num_threads(threads)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(STOPPED))  # before training, and after
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    print(f"{BEGUN} {time.strftime('%Y-%m-%d %H:%M:%S')}", flush=True)
    try:
        with _locked(log.parent.parent / RUNS_LOCK, shared=True):
            complete = work(task, device, False)
    except HeadstartError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(FAILED)
    except KeyboardInterrupt:
        complete = False
    sys.exit(0 if complete else STOPPED)


def _stop_with_parent() -> None:
    """A run whose command was killed would go on alone, and get in the way of the next one."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def _terminated_is_interrupted() -> Iterator[None]:
    """A cluster's SIGTERM ends the command as Ctrl-C does, with a word to the runs at work."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread: the caller's signals are its own business
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _last_words(log: Path, code: int | None) -> str:
    """Of the last try: the error, or where it ended without one, the last lines."""
    said = log.read_text(errors="replace").split("\n") if log.exists() else []
    begun = max((i for i, line in enumerate(said) if line.startswith(BEGUN)), default=-1)
    lines = [line.rstrip() for line in said[begun + 1 :] if line.strip()]
    errors = [i for i, line in enumerate(lines) if line.startswith("error: ")]
    told = lines[errors[-1] :] if errors else lines[-TAIL:]
    ended = f"was killed by signal {-code}" + (" (out of memory?)" if code == -9 else "") if code and code < 0 else ""
    text = "\n  ".join(told).removeprefix("error: ") or "it said nothing"
    return f"{ended or f'failed (exit code {code})'}; all it said is in {log}:\n  {text}"
