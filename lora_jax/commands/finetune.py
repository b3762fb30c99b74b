"""`lora-jax finetune`: a base model, a task, an adapter, and the run that brings them together."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.markup import escape

from lora_jax import checkpoint
from lora_jax.commands.display import printable, progress_bar, summary_table
from lora_jax.commands.errors import reading_input
from lora_jax.commands.run import Run, describe, load, make_batches, make_task, run_mesh
from lora_jax.summaries import summary
from lora_jax.training import hosts, loop, plots
from lora_jax.training.evaluation import Evaluation
from lora_jax.training.folder import CURVES, METRICS, RESULTS, FolderError, RunFolder
from lora_jax.training.mesh import spread
from lora_jax.training.objective import next_token_loss
from lora_jax.training.options import FinetuneOptions
from lora_jax.training.saves import Saves
from lora_jax.training.step import TrainState, make_step
from lora_jax.training.tasks import Sample


def finetune(options: FinetuneOptions, console: Console) -> None:
    """Runs `lora-jax finetune`.

    Raises:
        InputError, DataError, AssetError, FolderError, CheckpointError: the options, the model,
            the data, the output folder or its checkpoints cannot be used.
        DiskFull: there is no room for the results.
        NonFiniteLoss, Interrupted: as in `training.loop.run`.
    """
    started = time.perf_counter()
    with reading_input():
        options.check()
        devices = options.devices
        hosts.join(devices.coordinator, devices.num_hosts, devices.host_id)
        console.quiet = not hosts.is_first()
        mesh = run_mesh(options)
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        _finetune(options, mesh, console, started)


def _finetune(
    options: FinetuneOptions, mesh: Mesh | None, console: Console, started: float
) -> None:
    with reading_input():
        folder = RunFolder(options.folder())
        if options.resume:
            folder.about()
        else:
            folder.check_new(overwrite=options.overwrite)
        model = load(options, mesh, console)
        task = make_task(options, model, console)
        run = Run.prepare(options, mesh, model, task, folder)
    console.print(summary_table(summary(model.params, run.state.adapter)))
    about = describe(options, model, task, run.steps)
    hosts.wait_for_all("all have checked the folder")
    if not options.resume:
        folder.begin(about)
    with (
        loop.interruptible() as told,
        Saves(folder, run.config, model.params, keep=options.keep) as saves,
    ):
        stop = hosts.agreeing(told, mesh)
        state, place = run.state, None
        if options.resume:
            state, place = _restore(saves, run)
            folder.describe(about)
            console.print(f"Going on after step {int(state.step)} of {run.steps}.")
        try:
            state = _train(run, state, place, saves, stop, console)
        except loop.NonFiniteLoss as error:
            raise loop.NonFiniteLoss(
                f"{error} The last good adapter, after step {error.step - 1}, is in "
                f"{folder.adapter}. Look at these examples, or go on with a lower learning rate: "
                f"lora-jax finetune --resume --out {folder.path} --learning-rate ...",
                step=error.step,
            ) from error
    if reason := stop():
        raise loop.Interrupted(run.steps, reason)
    _report(run, state, console, seconds=time.perf_counter() - started)


def _restore(saves: Saves, run: Run) -> tuple[TrainState, dict[str, Any] | None]:
    """Where the run goes on: its last checkpoint, or its start if it has none yet."""
    folder, at = run.folder, run.options.resume_from
    state, place = run.state, None
    again = f"lora-jax finetune --resume --out {folder.path}"
    if at is not None or saves.latest() is not None:
        try:
            step, state, saved = saves.restore(run.state, at)
        except checkpoint.UnreadableError as error:
            fix = (
                "Start anew (--overwrite), or in another folder (--out)."
                if error.earlier is None
                else f"Go on from it: {again} --resume-from {error.earlier}"
            )
            raise FolderError(f"{error} Nothing was changed. {fix}") from error
        except checkpoint.CheckpointError as error:
            raise FolderError(
                f"{error} Give the options that the run was started with ({again} does), or start "
                "anew (--overwrite)."
            ) from error
        if saved["examples"] != run.task.digest():
            raise FolderError(
                f"{folder.path}: the run was made with other examples than these: the data, its "
                "split or its tokens changed. Give the same --data, --held-out and --seed, or "
                "start anew (--overwrite)."
            )
        if step > run.steps:
            raise FolderError(
                f"{folder.path}: the run is at step {step}, beyond --steps {run.steps}."
            )
        place = saved["batches"]
        saves.forget_after(step)
    folder.forget_after(int(state.step))
    return state, place


class _Events:
    """Writes what happens to the run's folder, and shows it."""

    def __init__(self, run: Run, saves: Saves, console: Console, progress: Any, bar: Any):
        self._run, self._saves, self._console = run, saves, console
        self._progress, self._bar, self._speed = progress, bar, 0.0
        self._digest = run.task.digest()

    def stepped(self, entry: dict[str, Any]) -> None:
        self._run.folder.log(entry)
        now = entry["tokens"] / max(entry["seconds"], 1e-9)
        self._speed = now if not self._speed else 0.9 * self._speed + 0.1 * now
        self._progress.update(self._bar, advance=1, loss=entry["loss"], speed=self._speed)

    def evaluated(self, step: int, evaluation: Evaluation) -> None:
        self._run.folder.log({"kind": "evaluation", "step": step, **dataclasses.asdict(evaluation)})
        of = "answers" if self._run.task.choices is not None else "tokens"
        self._console.print(
            f"Held out, after step {step}: {evaluation.accuracy:.1%} of the {of} right, loss "
            f"{evaluation.loss:.3f} ({evaluation.examples} examples)."
        )

    def save(
        self, step: int, state: TrainState, place: dict[str, Any], evaluation: Evaluation | None
    ) -> None:
        place = {"batches": place, "examples": self._digest}
        self._saves.save(step, state, place=place, evaluation=evaluation)


def _train(
    run: Run,
    state: TrainState,
    place: dict[str, Any] | None,
    saves: Saves,
    stop: Callable[[], Any],
    console: Console,
) -> TrainState:
    options, optimizer = run.options, run.options.optimizer
    batches = make_batches(options, run.task)
    if place is not None:
        batches.set_state(place)
    done = int(state.step)
    between = options.evaluations + 1
    evaluate_at = frozenset(round(run.steps * i / between) for i in range(1, between + 1))
    with progress_bar(console) as progress:
        bar = progress.add_task("", total=run.steps, completed=done, loss=np.nan, speed=0.0)
        events = _Events(run, saves, console, progress, bar)
        if not done:
            progress.stop()
            events.evaluated(0, run.evaluate(state.adapter, run.model.params))
            progress.start()
        learning_rates = optimizer.learning_rates(run.steps)
        return loop.run(
            state,
            run.model.params,
            step=make_step(
                next_token_loss(run.apply, dropout=options.lora.dropout > 0),
                optimizer.optimizer(run.steps),
                accumulate=optimizer.accumulate,
                max_grad_norm=optimizer.clip or None,
            ),
            batches=batches,
            steps=run.steps,
            learning_rate=learning_rates,
            evaluate=run.evaluate,
            evaluate_at=evaluate_at,
            save_every=options.save_every,
            stop=stop,
            events=events,
            where=lambda index: run.task.train[index].where,
            spread=lambda batch: spread(batch, run.mesh),
        )


def _report(run: Run, state: TrainState, console: Console, *, seconds: float) -> None:
    """Shows and writes accuracy, loss and answers before and after."""
    # All hosts compute the answers, one writes them. The start is the base: B is zero.
    said = [run.answers(adapter) for adapter in (run.start, state.adapter)]
    if not hosts.is_first():
        return
    entries = run.folder.metrics()
    evaluations = [entry for entry in entries if entry["kind"] == "evaluation"]
    before, after = evaluations[0], evaluations[-1]
    of = "answers" if run.task.choices is not None else "tokens"
    console.print(
        f"\n[bold]Held-out {of} right: {before['accuracy']:.1%} before, "
        f"{after['accuracy']:.1%} after; loss {before['loss']:.3f} before, {after['loss']:.3f} "
        f"after ({after['examples']} examples)[/bold]\n"
    )
    for sample, was, now in zip(run.task.samples, *said, strict=True):
        _show(sample, was, now, console)
    samples = [
        {"prompt": sample.shown, "wanted": sample.wanted, "before": was, "after": now}
        for sample, was, now in zip(run.task.samples, *said, strict=True)
    ]
    results = {
        "before": before,
        "after": after,
        "steps": run.steps,
        "seconds": round(seconds, 1),
        "samples": samples,
    }
    run.folder.write(RESULTS, json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    figure = plots.curves(entries, title=f"{run.model.name}, {run.steps} steps", accuracy_of=of)
    plots.save(figure, [run.folder.path / name for name in CURVES])
    path = run.folder.path
    console.print(
        f"{seconds:.0f} seconds in all. In {escape(str(path))}: adapter/, {METRICS}, {RESULTS}, "
        f"{', '.join(CURVES)}\n"
        f"Try it: lora-jax generate --adapter {escape(str(path))} --prompt '...'"
    )


def _show(sample: Sample, was: str, now: str, console: Console) -> None:
    console.print(f"[bold]{escape(printable(sample.shown))}[/bold]")
    for label, text in (("wanted", sample.wanted), ("before", was), ("after", now)):
        console.print(f"  {label}: {escape(printable(text))}")
