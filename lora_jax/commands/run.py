"""What a fine-tuning run needs before its first step: mesh, base, task, adapter and state."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.markup import escape

from lora_jax.config import LoraConfig
from lora_jax.initialization import init
from lora_jax.interop.pretrained import Pretrained, load_pretrained
from lora_jax.models import decoder
from lora_jax.models.generation import generate_batch
from lora_jax.quantization.formats import Format
from lora_jax.training.batching import training_batches
from lora_jax.training.evaluation import Evaluation, make_evaluate
from lora_jax.training.folder import RunFolder
from lora_jax.training.mesh import check_rows, make_mesh, parse_mesh, start_on_mesh
from lora_jax.training.options import FinetuneOptions
from lora_jax.training.step import TrainState, init_state
from lora_jax.training.tasks import Task, file_task, tweets_task
from lora_jax.transform.lift import lift
from lora_jax.tree import Update, combine, is_virtual

# What takes about 5 minutes in all on two cores.
TWEETS_STEPS = 240
ANSWER_TOKENS = 24


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
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
    ) -> Run:
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


def run_mesh(options: FinetuneOptions) -> Mesh | None:
    """The mesh that the options ask for, of all devices of all hosts; None for one device."""
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


def load(options: FinetuneOptions, mesh: Mesh | None, console: Console) -> Pretrained:
    """Loads the base, and says what it is."""
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


def make_task(options: FinetuneOptions, model: Pretrained, console: Console) -> Task:
    """What is learned and measured on, and says what was read."""
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
    return sum(1 for _ in make_batches(options, task, epochs=options.epochs))


def make_batches(options: FinetuneOptions, task: Task, epochs: int | None = None) -> Any:
    """The batches of the training, from the first."""
    return training_batches(
        task.train,
        row_length=options.data.row_length,
        rows=options.data.rows * options.optimizer.accumulate,
        seed=options.seed,
        epochs=epochs,
    )


def describe(options: FinetuneOptions, model: Pretrained, task: Task, steps: int) -> dict[str, Any]:
    """What `run.json` says: enough to go on, and to prompt the model as it was trained."""
    again = dataclasses.replace(options, resume=False, resume_from=None, overwrite=False)
    return {
        "options": again.to_dict(),
        "model": model.name if not Path(model.name).exists() else str(Path(model.name).absolute()),
        "steps": steps,
        "prompt": dataclasses.asdict(task.form),
        "data": list(task.notes),
    }
