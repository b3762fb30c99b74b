"""`lora-jax finetune`: a base model, a task, an adapter, and the run that brings them together."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.markup import escape

from lora_jax import checkpoint
from lora_jax.commands.display import printable, progress_bar, summary_table
from lora_jax.commands.errors import reading_input
from lora_jax.config import LoraConfig
from lora_jax.initialization import init
from lora_jax.interop.pretrained import Pretrained, load_pretrained
from lora_jax.models import decoder
from lora_jax.models.generation import generate_batch
from lora_jax.quantization.formats import Format
from lora_jax.summaries import summary
from lora_jax.training import hosts, loop, plots
from lora_jax.training.batching import training_batches
from lora_jax.training.evaluation import Evaluation, make_evaluate
from lora_jax.training.folder import CURVES, METRICS, RESULTS, FolderError, RunFolder
from lora_jax.training.mesh import check_rows, make_mesh, parse_mesh, spread, start_on_mesh
from lora_jax.training.objective import next_token_loss
from lora_jax.training.options import FinetuneOptions
from lora_jax.training.saves import Saves
from lora_jax.training.step import TrainState, init_state, make_step
from lora_jax.training.tasks import Sample, Task, file_task, tweets_task
from lora_jax.transform.lift import lift
from lora_jax.tree import Update, combine, is_virtual

# What takes about 5 minutes in all on two cores.
TWEETS_STEPS = 240
ANSWER_TOKENS = 24


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
        mesh = _mesh(options)
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
        model = _load(options, mesh, console)
        task = _task(options, model, console)
        run = _Run.prepare(options, mesh, model, task, folder)
    console.print(summary_table(summary(model.params, run.state.adapter)))
    about = _about(options, model, task, run.steps)
    hosts.wait_for_all("all have checked the folder")
    if not options.resume:
        folder.begin(about)
    with (
        loop.interruptible() as told,
        Saves(folder, run.config, model.params, keep=options.keep) as saves,
    ):
        stop = hosts.agreeing(told)
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


@dataclasses.dataclass(frozen=True, eq=False)
class _Run:
    """Everything that one run needs, before its first step."""

    options: FinetuneOptions
    mesh: Mesh | None
    model: Pretrained
    task: Task
    folder: RunFolder
    config: LoraConfig
    start: dict[str, Update]
    state: TrainState
    steps: int
    apply: Callable[..., Any]
    evaluate: Callable[[Any, Any], Evaluation]

    @classmethod
    def prepare(
        cls,
        options: FinetuneOptions,
        mesh: Mesh | None,
        model: Pretrained,
        task: Task,
        folder: RunFolder,
    ) -> _Run:
        """Makes the adapter and the optimizer's state; compiles nothing."""
        config = options.lora.config(tied_head=model.config.tied_head)
        base = functools.partial(decoder.apply, model.config)
        apply = lift(base)
        steps = _steps(options, task)
        start, dropout = jax.random.split(jax.random.key(options.seed))
        tx = options.optimizer.optimizer(steps)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), model.params)
        make_adapter = functools.partial(
            init, start, config, base, shapes, np.zeros((1, 2), np.int32)
        )
        if mesh is None:
            adapter = make_adapter()
            state = init_state(adapter, tx, dropout)
        else:
            adapter, state = start_on_mesh(make_adapter, model.params, tx, dropout, mesh)
        evaluate = make_evaluate(
            apply,
            task.held_out,
            row_length=options.data.row_length,
            rows=options.data.rows,
            choices=task.choices,
            mesh=mesh,
        )
        return cls(
            options, mesh, model, task, folder, config, adapter, state, steps, apply, evaluate
        )

    def answers(self, adapter: Any) -> list[str]:
        """What the model says to the samples."""
        longest = max(len(sample.prompt) for sample in self.task.samples)
        ids = generate_batch(
            self.apply,
            combine(self.model.params, adapter),
            [sample.prompt for sample in self.task.samples],
            config=self.model.config,
            max_new_tokens=min(ANSWER_TOKENS, self.model.config.max_length - longest),
            eos_ids=self.model.tokenizer.eos_ids,
        )
        return [self.model.tokenizer.decode(answer).strip() for answer in ids]


def _mesh(options: FinetuneOptions) -> Mesh | None:
    if options.devices.mesh is None:
        if jax.process_count() > 1:
            raise ValueError(
                f"mesh: expected axes for the {jax.device_count()} devices of "
                f"{jax.process_count()} hosts, such as data={jax.device_count()}, got none."
            )
        return None
    mesh = make_mesh(parse_mesh(options.devices.mesh))
    check_rows(options.data.rows, mesh)
    return mesh


def _load(options: FinetuneOptions, mesh: Mesh | None, console: Console) -> Pretrained:
    console.print(f"Model: {escape(options.model.model)}")
    model = load_pretrained(
        options.model.model,
        dtype=options.model.dtype,
        scan_layers=not options.model.unroll,
        remat=options.model.remat,
        quantize=None if options.model.quantize is None else Format(options.model.quantize),
        compute_dtype=options.model.dtype,
        mesh=mesh,
    )
    count = sum(leaf.size for leaf in jax.tree.leaves(model.params, is_leaf=is_virtual))
    config = model.config
    console.print(
        f"  {count:,} parameters in {config.num_layers} layers of {config.hidden_size}, "
        f"{config.vocab_size:,} tokens in the vocabulary, {config.dtype}"
    )
    if options.data.row_length > config.max_length:
        raise ValueError(
            f"row_length: expected at most the model's {config.max_length}, got "
            f"{options.data.row_length}."
        )
    return model


def _task(options: FinetuneOptions, model: Pretrained, console: Console) -> Task:
    data = options.data
    common = {"held_out": data.held_out, "seed": options.seed, "row_length": data.row_length}
    if data.data is None:
        steps = TWEETS_STEPS if options.steps is None else options.steps
        tokens = steps * data.rows * options.optimizer.accumulate * data.row_length
        task = tweets_task(model.tokenizer, tokens_wanted=tokens, **common)
    else:
        task = file_task(data.data, model.tokenizer, **common)
    console.print("Data: " + escape("\n  ".join(task.notes)))
    return task


def _steps(options: FinetuneOptions, task: Task) -> int:
    if options.steps is not None:
        return options.steps
    if options.data.data is None:
        return TWEETS_STEPS
    return sum(1 for _ in _batches(options, task, epochs=options.epochs))


def _batches(options: FinetuneOptions, task: Task, epochs: int | None = None) -> Any:
    return training_batches(
        task.train,
        row_length=options.data.row_length,
        rows=options.data.rows * options.optimizer.accumulate,
        seed=options.seed,
        epochs=epochs,
    )


def _about(options: FinetuneOptions, model: Pretrained, task: Task, steps: int) -> dict[str, Any]:
    """What `run.json` says: enough to go on, and to prompt the model as it was trained."""
    again = dataclasses.replace(options, resume=False, resume_from=None, overwrite=False)
    return {
        "options": again.to_dict(),
        "model": model.name if not Path(model.name).exists() else str(Path(model.name).absolute()),
        "steps": steps,
        "prompt": dataclasses.asdict(task.form),
        "data": list(task.notes),
    }


def _restore(saves: Saves, run: _Run) -> tuple[TrainState, dict[str, Any] | None]:
    """Where the run goes on: its last checkpoint, or its start if it has none yet."""
    folder, at = run.folder, run.options.resume_from
    state, place = run.state, None
    again = f"lora-jax finetune --resume --out {folder.path}"
    if at is not None or checkpoint.latest_step(folder.checkpoints) is not None:
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

    def __init__(self, run: _Run, saves: Saves, console: Console, progress: Any, bar: Any):
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
    run: _Run,
    state: TrainState,
    place: dict[str, Any] | None,
    saves: Saves,
    stop: Callable[[], Any],
    console: Console,
) -> TrainState:
    options, optimizer = run.options, run.options.optimizer
    batches = _batches(options, run.task)
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


def _report(run: _Run, state: TrainState, console: Console, *, seconds: float) -> None:
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
