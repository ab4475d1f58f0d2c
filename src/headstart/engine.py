"""The only training loop. Pretraining and fine-tuning hand it a :class:`Job`; it knows nothing of either.

What it promises:

* Sample n of a run is the same whatever the number of workers and processes, and after a resume: it is drawn from
  (seed, n) alone. N processes with B / N images each do the step of one process with B.
* A killed run goes on from its last checkpoint to the same numbers, bit for bit on CPU.
* A loss that is not finite stops the run before anything of it is saved.
* What a job does between steps (new boxes, validation) leaves random state and modes as training had them.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from headstart import checkpoint, distributed, views
from headstart.console import notes, progress
from headstart.errors import ImageError, RunError, SettingsError, TrainingError
from headstart.files import replacing
from headstart.optim import OptimSettings, build_optimizer, learning_rate, set_learning_rate
from headstart.runs import Run, usable_cores
from headstart.settings import Settings


class TrainSettings(Settings):
    epochs: float | None = Field(None, gt=0, description="passes over the images; unset: see max_steps")
    max_steps: int | None = Field(None, ge=1, description="steps of the optimiser; wins over epochs")
    batch_size: int | None = Field(
        None,
        ge=1,
        description="images a step, over all processes and accumulated parts; unset: chosen, printed",
    )
    accumulate: int = Field(
        1,
        ge=1,
        description="parts a step's batch is computed in, to save memory; batch norm sees one part at a time",
    )
    seed: int = Field(0, ge=0, description="seed of everything random")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:1")
    amp: Literal["auto", "off", "bf16", "fp16"] = Field(
        "auto", description="mixed precision; auto: bf16 where the device computes it natively, else off"
    )
    channels_last: bool = Field(True, description="memory layout that convolutions are faster in")
    workers: int | None = Field(None, ge=0, description="data worker processes; unset: from the cores")
    log_every: int = Field(10, ge=1, description="steps between lines of log.jsonl")
    checkpoint_every: int | None = Field(
        None, ge=1, description="steps between checkpoints; unset: a tenth of the run, at most 1000"
    )
    keep_checkpoints: int = Field(2, ge=1, description="newest checkpoints kept")
    max_unreadable: float = Field(
        0.1, ge=0, le=1, description="share of images that may turn out unreadable before the run stops"
    )

    @field_validator("amp", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML reads a bare off as false


class Batch(Protocol):
    def to(self, device: torch.device) -> Batch: ...


@dataclass
class Job:
    """What to train, and on what.

    Attributes:
        name: shown in the progress bar.
        model: ``model(batch) -> {term: loss}``; its state dict is what checkpoints hold.
        images: how many samples an epoch has.
        load: ``(index, rng) -> sample``, run in workers; raises ImageError for an unreadable image.
        collate: ``[sample] -> batch``.
        name_of: ``index -> name`` of an image, for messages.
        after_step: called with (step, total_steps) when the parameters have moved.
        watch: health of the run, called after a step that is logged.
        warn: ``watched -> message`` where the run looks sick.
        renew_every, renew: called with the number of steps done before the first step, after a resume, and every so
            many steps; brings ``load`` up to date. Where it returns True the data workers start anew.
        examine_every, examine: called with the number of steps done every so many steps and at the end, on all
            processes; returns what is logged, and whether the run should end here. A checkpoint follows.
        state, restore: what ``examine`` has to remember, for checkpoints; plain values.
    """

    name: str
    model: nn.Module
    images: int
    load: Callable[[int, np.random.Generator], Any]
    collate: Callable[[list[Any]], Any]
    name_of: Callable[[int], str]
    after_step: Callable[[int, int], None] = lambda step, total: None
    watch: Callable[[], dict[str, Any]] = dict
    warn: Callable[[Mapping[str, Any]], str | None] = lambda watched: None
    renew_every: int | None = None
    renew: Callable[[int], bool] = lambda done: False
    examine_every: int | None = None
    examine: Callable[[int], tuple[dict[str, Any], bool]] = lambda done: ({}, False)
    state: Callable[[], dict[str, Any]] = dict
    restore: Callable[[dict[str, Any]], None] = lambda state: None


@dataclass
class Summary:
    steps: int
    seconds: float
    loss: float | None
    finished: bool
    unreadable: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "seconds": round(self.seconds, 1),
            "loss": self.loss,
            "unreadable": self.unreadable,
        }


def pick_device(name: str) -> torch.device:
    """Raises: SettingsError for a device that is not there."""
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    try:
        device = torch.device(name)
    except RuntimeError:
        raise SettingsError(f"--device {name}: expected auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SettingsError(f"--device {name}: this machine, or this build of torch, has no CUDA device")
    return device


def pick_amp(amp: str, device: torch.device) -> torch.dtype | None:
    if amp == "off":
        return None
    if amp == "fp16":
        if device.type != "cuda":
            raise SettingsError("train.amp=fp16 needs a CUDA device; use bf16 or off")
        return torch.float16
    if amp == "bf16":
        return torch.bfloat16
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if native_bf16_cpu() else None


def native_bf16_cpu() -> bool:
    """Whether the CPU multiplies bf16 itself; emulated, it is several times slower than float32."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


class _Stream(Dataset):
    """Sample n of a run, for any n: epoch n // images, at the place that epoch's shuffle gives it."""

    def __init__(self, job: Job, seed: int) -> None:
        self.load, self.name_of, self.images, self.seed = job.load, job.name_of, job.images, seed
        self._shuffle: tuple[int, np.ndarray] | None = None

    def index(self, n: int) -> int:
        epoch, place = divmod(n, self.images)
        if self._shuffle is None or self._shuffle[0] != epoch:
            order = np.random.default_rng([self.seed, 1, epoch]).permutation(self.images)
            self._shuffle = (epoch, order)
        return int(self._shuffle[1][place])

    def __getitem__(self, n: int) -> tuple[Any, dict[str, str]]:
        """The sample, and what could not be read on the way to it: the next image takes a bad one's place."""
        index = self.index(n)
        unreadable: dict[str, str] = {}
        for attempt in range(min(self.images, 100)):
            place = (index + attempt) % self.images
            try:
                return self.load(place, np.random.default_rng([self.seed, 2, n])), unreadable
            except ImageError as error:
                unreadable[self.name_of(place)] = str(error)
        # The main process says so: an error raised here would come with the worker's traceback.
        return None, unreadable


class _Collate:
    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, samples: list[tuple[Any, dict[str, str]]]) -> tuple[Any, dict[str, str]]:
        unreadable = {name: reason for _, found in samples for name, reason in found.items()}
        found = [sample for sample, _ in samples]
        return None if any(sample is None for sample in found) else self.collate(found), unreadable


class _Numbers:
    """The sample numbers of each part of each step, for this process."""

    def __init__(self, first_step: int, total_steps: int, batch_size: int, parts: int) -> None:
        self.first_step, self.total_steps = first_step, total_steps
        self.batch_size, self.parts = batch_size, parts
        self.rank, self.world = distributed.rank(), distributed.world()

    def __len__(self) -> int:
        return (self.total_steps - self.first_step) * self.parts

    def __iter__(self) -> Iterator[list[int]]:
        size = self.batch_size // (self.world * self.parts)
        for step in range(self.first_step, self.total_steps):
            for part in range(self.parts):
                start = step * self.batch_size + (part * self.world + self.rank) * size
                yield list(range(start, start + size))


def worker_init(worker: int) -> None:
    """One thread a worker: their number is what uses the cores."""
    views.worker_init(worker)
    torch.set_num_threads(1)
    # Ctrl-C and a cluster's SIGTERM reach the whole group; they are for the main process, which ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def worker_count(settings: TrainSettings, device: torch.device) -> int:
    """Data workers of this process."""
    if settings.workers is not None:
        return settings.workers
    cores = max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    # On CPU the networks want the cores themselves; a little help with decoding is enough.
    return min(8, max(1, cores - 1)) if device.type == "cuda" else max(1, cores // 4)


def _loader(job: Job, settings: TrainSettings, numbers: _Numbers, device: torch.device) -> DataLoader:
    workers = worker_count(settings, device)
    return DataLoader(
        _Stream(job, settings.seed),
        batch_sampler=numbers,  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=_Collate(job.collate),
        worker_init_fn=worker_init if workers else None,
        pin_memory=device.type == "cuda",
        prefetch_factor=4 if workers else None,
        generator=torch.Generator(),  # its own, or starting the loader would draw from the run's random state
    )


class _Log:
    """log.jsonl and TensorBoard. After a resume, what was logged beyond the checkpoint is dropped."""

    def __init__(self, run: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = run / "log.jsonl"
        kept = []
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(json.JSONDecodeError):  # a killed process may leave half a line
                    if json.loads(line)["step"] <= first_step:
                        kept.append(line)
        with replacing(self.path) as temporary:
            temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - open for the whole run
        self._board = SummaryWriter(str(run), purge_step=first_step + 1)

    def write(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()
        step = entry["step"]
        for group in ("terms", "validation"):
            for name, value in entry.get(group, {}).items():
                if value is not None:
                    self._board.add_scalar(f"{'loss' if group == 'terms' else group}/{name}", value, step)
        for name in ("loss", "lr", "images_per_s"):
            if name in entry:
                self._board.add_scalar(name, entry[name], step)
        for name, value in entry.get("watch", {}).items():
            values = value if isinstance(value, list) else [value]
            for i, number in enumerate(values):
                self._board.add_scalar(f"watch/{name}" + (f"/{i}" if len(values) > 1 else ""), number, step)

    def close(self) -> None:
        self._file.close()
        self._board.close()


@contextlib.contextmanager
def _stop_requests() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and a cluster's SIGTERM ask for a stop at the end of the step; a second Ctrl-C stops at once."""
    asked = False

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked = True
        if distributed.is_main():
            notes.print("stopping after this step, with a checkpoint (Ctrl-C again: at once, without)")

    try:
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: the caller's signals are its own business
        yield lambda: False
        return
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Without gradient; afterwards random state and every module's mode are as before."""
    before = checkpoint.random_state()
    training = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in training.items():
            module.training = mode
        checkpoint.set_random_state(before)


def fit(
    job: Job,
    settings: TrainSettings,
    optim: OptimSettings,
    run: Run,
    resume: bool = False,
    show: bool = True,
) -> Summary:
    """Train ``job.model`` for ``settings.max_steps`` steps, from the run's last checkpoint where ``resume``.

    Raises:
        TrainingError: the loss is not finite, or too many images can't be read.
        RunError: no checkpoint can be read or written.
        SettingsError: the batch can't be divided over processes and parts.
    """
    assert settings.max_steps is not None
    assert settings.batch_size is not None
    total, batch_size, parts = settings.max_steps, settings.batch_size, settings.accumulate
    world = distributed.world()
    if batch_size % (world * parts):
        raise SettingsError(
            f"--batch-size {batch_size}: can't be divided over {world} processes x {parts} parts (train.accumulate)"
        )
    device = pick_device(settings.device)
    dtype = pick_amp(settings.amp, device)
    model = job.model.to(device)
    if settings.channels_last:
        model = model.to(memory_format=torch.channels_last)
    model.train()
    optimizer = build_optimizer([model], optim)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
    torch.manual_seed(settings.seed * 1_000_003 + distributed.rank())

    first = 0
    unreadable: dict[str, str] = {}
    last_loss: float | None = None
    examined, ended = 0, False  # steps done at the last examination, and whether it ended the run
    if resume and (found := checkpoint.load_latest(run.path)) is not None:
        if len(found.state["random"]) != world:
            raise RunError(f"{run.path}: was run by {len(found.state['random'])} processes, now {world}")
        model.load_state_dict(found.model)
        optimizer.load_state_dict(found.state["optimizer"])
        scaler.load_state_dict(found.state["scaler"])
        unreadable, last_loss = dict(found.state["unreadable"]), found.state.get("loss")
        examined, ended = found.state.get("examined", 0), found.state.get("ended", False)
        job.restore(found.state.get("job", {}))
        checkpoint.set_random_state(found.state["random"][distributed.rank()])
        first = found.step
        if distributed.is_main():
            notes.print(f"{run.path}: resumed at step {first} of {total}")

    log = _Log(run.path, first) if distributed.is_main() else None
    every = settings.checkpoint_every or max(1, min(1000, total // 10))
    every_step_checked = device.type == "cpu"  # elsewhere reading the loss would make the device wait
    start = logged_at = time.monotonic()
    sums: dict[str, Tensor] = {}
    counted = 0
    step = first
    warned = False

    def due(at: int) -> bool:
        """Whether the model of ``at`` steps is still to be examined."""
        return job.examine_every is not None and at > examined and (at % job.examine_every == 0 or at == total)

    def save(at: int) -> None:
        states = distributed.gather(checkpoint.random_state())
        if distributed.is_main():
            extra = {"scaler": scaler.state_dict(), "unreadable": unreadable, "loss": last_loss}
            extra |= {"examined": examined, "ended": ended, "job": job.state()}
            checkpoint.save(run.path, at, model, optimizer, states, extra, settings.keep_checkpoints)
        distributed.barrier()

    with contextlib.ExitStack() as stack:
        stop_asked = stack.enter_context(_stop_requests())
        stack.enter_context(distributed.synchronised_batch_norm(model, device))
        if log is not None:
            stack.callback(log.close)
        wrapped: nn.Module = model
        if world > 1:
            wrapped = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
        batches: Iterator[Any] | None = None
        bar = stack.enter_context(progress(job.name, total, "steps", show and distributed.is_main()))
        if first:
            bar.advance(first)

        while True:
            if due(step):
                with _undisturbed(model):
                    entry, ended = job.examine(step)
                examined, logged_at = step, time.monotonic()
                if log is not None:
                    log.write({"step": step, **entry, "seconds": round(logged_at - start, 2)})
                save(step)
            if step >= total or ended:
                break
            if batches is None or (job.renew_every is not None and step % job.renew_every == 0):
                with _undisturbed(model):
                    renewed = job.renew(step)
                if renewed or batches is None:
                    batches = iter(_loader(job, settings, _Numbers(step, total, batch_size, parts), device))
                    logged_at = time.monotonic()
            rate = learning_rate(step, total, optim)
            set_learning_rate(optimizer, rate)
            optimizer.zero_grad(set_to_none=True)
            for part in range(parts):
                batch, found_bad = next(batches)
                unreadable |= found_bad
                if batch is None:
                    raise TrainingError(f"none of {len(found_bad)} images in a row can be read: {_some(found_bad)}")
                last = part == parts - 1
                waiting = wrapped.no_sync() if world > 1 and not last else contextlib.nullcontext()
                with waiting:
                    with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
                        terms = wrapped(batch.to(device))
                    loss = torch.stack(list(terms.values())).sum()
                    scaler.scale(loss / parts).backward()
                for name, value in {**terms, "loss": loss}.items():
                    sums[name] = sums.get(name, 0) + value.detach().float() / parts
            if every_step_checked:
                _check_finite(sums["loss"], terms, step, run.path, rate)
            if optim.clip:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), optim.clip)
            scaler.step(optimizer)
            scaler.update()
            job.after_step(step, total)
            step += 1
            counted += 1
            bar.advance(1)

            stopping = stop_asked() if world == 1 else distributed.any_process(stop_asked(), device)
            if step % settings.log_every == 0 or step == total or stopping or due(step):
                means = {k: float(distributed.mean(v) / counted) for k, v in sums.items()}
                _check_finite(sums["loss"], terms, step - 1, run.path, rate)
                last_loss = means.pop("loss")
                now = time.monotonic()
                entry = {
                    "step": step,
                    "loss": last_loss,
                    "terms": means,
                    "lr": rate,
                    "images_per_s": round(counted * batch_size / max(now - logged_at, 1e-9), 2),
                    "seconds": round(now - start, 2),
                }
                watched = job.watch()
                if watched:
                    entry["watch"] = watched
                    message = job.warn(watched) if not warned else None
                    if message and distributed.is_main():
                        warned = True
                        notes.print(f"[bold yellow]Step {step}: {message}.[/bold yellow]")
                if log is not None:
                    log.write(entry)
                bar.advance(0, _line(entry))
                sums, counted, logged_at = {}, 0, now
            _check_unreadable(unreadable, job.images, settings.max_unreadable)
            saving = stopping or step % every == 0 or step == total
            if counted and (saving or due(step)):
                _check_finite(sums["loss"], terms, step - 1, run.path, rate)
            if stopping or (saving and not due(step)):
                save(step)
            if stopping:
                break
    finished = ended or (step >= total and not due(step))
    return Summary(step, time.monotonic() - start, last_loss, finished, unreadable)


def _line(entry: Mapping[str, Any]) -> str:
    terms = entry["terms"]
    inside = f" ({', '.join(f'{k} {v:.3g}' for k, v in terms.items())})" if len(terms) > 1 else ""
    return f"loss {entry['loss']:.4f}{inside}  {entry['images_per_s']:.1f} img/s"


def _check_finite(total: Tensor, terms: Mapping[str, Tensor], step: int, run: Path, rate: float) -> None:
    if bool(torch.isfinite(total)):
        return
    shown = ", ".join(f"{name} {float(value.detach()):.4g}" for name, value in terms.items())
    saved = checkpoint.newest(run)
    kept = f"The last good checkpoint is {saved}" if saved else "No checkpoint had been written yet"
    raise TrainingError(
        f"{run}: the loss is no longer finite at step {step + 1} ({shown}; lr {rate:.3g}). {kept}. "
        "Try a lower learning rate (--set optim.lr=...), gradient clipping (--set optim.clip=1), a longer warm-up "
        "(--set optim.warmup_steps=...), or --set train.amp=off"
    )


def _check_unreadable(unreadable: Mapping[str, str], images: int, limit: float) -> None:
    if len(unreadable) > max(1, limit * images):
        raise TrainingError(
            f"{len(unreadable)} of {images} images can't be read, more than {limit:.0%} "
            f"(train.max_unreadable): {_some(unreadable)}"
        )


def _some(unreadable: Mapping[str, str]) -> str:
    return "; ".join(list(unreadable.values())[:5])
