"""`lora-jax plan`: what fine-tuning a model takes, before anything is loaded or rented."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any, Literal

import jax
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lora_jax.commands.errors import InputError, reading_input
from lora_jax.interop.pretrained import load_config
from lora_jax.models.known import DECODERS, SHAPES, known
from lora_jax.planning.advice import advice
from lora_jax.planning.chips import HBM, parse_topology
from lora_jax.planning.plan import Plan
from lora_jax.planning.plan import plan as make_plan
from lora_jax.planning.state import Method
from lora_jax.training.mesh import parse_mesh
from lora_jax.training.options import FinetuneOptions, LoraOptions


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """Say what fine-tuning takes, and whether it fits, without loading or renting anything.

    Attributes:
        model: A name: llama-3.1-8b, llama-3.1-70b, llama-3.1-405b, qwen3-8b, qwen3-32b or
            gpt3-175b. Or what `finetune` takes, of which only the config is read.
        method: Adapters (lora), the same on a base in 4 bits (qlora), or all parameters (full).
        rank: Of the adapters; by default as in `finetune`: 8, or 64 for qlora.
        targets: Which weights get adapters, as in `finetune`.
        mesh: How many devices there are, and what they split: rows of the batch (data), those and
            the weights (fsdp), heads and hidden units (tensor), such as data=2,fsdp=4.
        batch_size: Rows in all.
        seq_len: Tokens in a row.
        dtype: Of the base and of the arithmetic. Adapters are float32.
        topology: Also compile the step for these chips, such as v5e:2x4 or v5p:2x2x2: the answer of
            the TPU's compiler itself, with no TPU. Takes a minute or more.
        json: Print JSON instead of a table.
    """

    model: str
    method: Method = "lora"
    rank: int | None = None
    targets: tuple[str, ...] = ("all-linear",)
    mesh: str = "data=1"
    batch_size: int = 1
    seq_len: int = 2048
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    topology: str | None = None
    json: bool = False


def plan(options: PlanOptions, console: Console) -> None:
    """Runs `lora-jax plan`. What does not fit is an answer, too.

    Raises:
        InputError, CompilerError: the options or the model's config cannot be used, or the
            compiler is not there.
    """
    # No device is needed: none is looked for, and a TPU that is here is left to others.
    jax.config.update("jax_platforms", "cpu")
    with reading_input():
        arguments = _arguments(options)
        made = make_plan(**arguments)
        chip = min(HBM, key=HBM.__getitem__)
        if options.topology is not None:
            chip = parse_topology(options.topology).kind
        changes = advice(arguments, made, HBM[chip]) if made.spare()[chip] < 0 else None
    if options.json:
        console.print_json(json.dumps(as_json(made)))
        return
    console.print(_table(made))
    for line in made.verdicts():
        console.print(escape(line))
    if options.method != "full":
        console.print(f"Planned is: {escape(_command(options, arguments))}")
    if changes is not None:
        text = " Or ".join(changes) or "no smaller batch, other method or larger fsdp is enough."
        console.print(f"To fit {chip}: {escape(text)}")


def as_json(made: Plan) -> dict[str, Any]:
    """A plan as plain values."""
    plain = dataclasses.asdict(made)
    plain["memory"]["total"] = made.memory.total
    return {**plain, "mesh": dict(made.mesh), "share": made.share, "spare": made.spare()}


def _arguments(options: PlanOptions) -> dict[str, Any]:
    """Those of `lora_jax.plan`."""
    if options.model in {**DECODERS, **SHAPES} and not Path(options.model).exists():
        model = known(options.model)
    else:
        try:
            model = load_config(options.model)
        except FileNotFoundError as error:
            names = ", ".join({**DECODERS, **SHAPES})
            raise InputError(f"{error} Known by name are {names}.") from error
    rank = options.rank
    if rank is None:
        run = FinetuneOptions.qlora() if options.method == "qlora" else FinetuneOptions()
        rank = run.lora.rank
    tied = getattr(model, "tied_head", True)
    return {
        "model": model,
        "name": options.model,
        "config": LoraOptions(rank=rank, targets=options.targets).config(tied_head=tied),
        "method": options.method,
        "mesh": parse_mesh(options.mesh),
        "batch_size": options.batch_size,
        "seq_len": options.seq_len,
        "dtype": options.dtype,
        "topology": options.topology,
    }


def _command(options: PlanOptions, arguments: dict[str, Any]) -> str:
    """The run that was planned."""
    quantize = " --quantize nf4" if options.method == "qlora" else ""
    return (
        f"lora-jax finetune --model {shlex.quote(options.model)} --dtype {options.dtype} --remat"
        f"{quantize} --rank {arguments['config'].rank} --rows {options.batch_size} --row-length "
        f"{options.seq_len} --mesh {options.mesh}"
    )


def _table(made: Plan) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column(escape(made.model), no_wrap=True)
    table.add_column(made.method, overflow="fold")
    for what, how_much in made.rows():
        table.add_row(escape(what), escape(how_much))
    return table
