"""The command line: `lora-jax finetune | plan | generate | merge | inspect`."""

from __future__ import annotations

import dataclasses
import logging
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from typing import Annotated, Any, TypeAlias

import tyro
from rich.console import Console

from lora_jax.commands.errors import INPUT_ERRORS, InputError, reading_input
from lora_jax.commands.finetune import finetune
from lora_jax.commands.generate import GenerateOptions, generate
from lora_jax.commands.inspect import InspectOptions, inspect
from lora_jax.commands.merge import MergeOptions, merge
from lora_jax.commands.plan import PlanOptions, plan
from lora_jax.training.folder import RunFolder
from lora_jax.training.loop import Interrupted
from lora_jax.training.options import FinetuneOptions

DEBUG = "LORA_JAX_DEBUG"
PROGRAM = "lora-jax"

Options: TypeAlias = FinetuneOptions | PlanOptions | GenerateOptions | MergeOptions | InspectOptions


def main() -> None:
    """Runs the command line and ends the process with its exit status."""
    if not os.environ.get(DEBUG):
        # Orbax raises what goes wrong in its threads, and logs it there too, with tracebacks.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Runs one command.

    Args:
        arguments: without the program's name.

    Returns:
        The exit status: 0, also after SIGTERM in training, which is saved; 2 for input that cannot
        be used, which includes training that diverges: one message, and no traceback unless the
        environment variable LORA_JAX_DEBUG is set; 130 after Ctrl-C.
    """
    console = Console(highlight=False, soft_wrap=True)
    errors = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
    options = None
    try:
        options = parse(arguments)
        match options:
            case FinetuneOptions():
                finetune(options, console)
            case PlanOptions():
                plan(options, console)
            case GenerateOptions():
                generate(options, console)
            case MergeOptions():
                merge(options, console)
            case InspectOptions():
                inspect(options, console)
    except INPUT_ERRORS as error:
        if os.environ.get(DEBUG):
            raise
        errors.print(f"Error: {_message(error)}")
        return 2
    except Interrupted as stop:
        assert isinstance(options, FinetuneOptions)
        again = f"{PROGRAM} finetune --resume --out {shlex.quote(str(options.folder()))}"
        if options.devices.coordinator is not None:
            again += " on every host, with --coordinator and what belongs to it as before"
        errors.print(f"\nStopped after step {stop.step}. The adapter is saved. Go on with: {again}")
        return 0 if stop.signal == signal.SIGTERM else 130
    except SystemExit as stop:  # --help, or arguments that make no sense: tyro has said so.
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        errors.print("\nStopped; nothing was saved beyond what was saved before.")
        return 130
    return 0


def parse(arguments: Sequence[str]) -> Options:
    """The options that arguments mean; a run that goes on starts from those it was started with.

    What is not given has the defaults of the method: with `--quantize`, those of QLoRA.

    Raises:
        InputError: a value is out of range, or there is no run to go on with.
        SystemExit: `--help`, or arguments that make no sense; tyro has printed why.
    """
    with reading_input():
        options = _cli(arguments, FinetuneOptions())
        if isinstance(options, FinetuneOptions) and options.resume:
            # Those that are given again count; the others are those of the run.
            about = RunFolder(options.folder()).about()
            try:
                saved = FinetuneOptions.from_dict(about["options"])
            except (KeyError, TypeError, ValueError) as error:
                raise InputError(
                    f"{options.folder()}: run.json does not hold a run's options ({error}). Start "
                    "the run anew (--overwrite)."
                ) from error
            saved = dataclasses.replace(
                saved, out=options.folder(), overwrite=False, resume_from=None
            )
            options = _cli(arguments, saved)
        elif isinstance(options, FinetuneOptions) and options.model.quantize is not None:
            options = _cli(arguments, FinetuneOptions.qlora())
    return options


def _cli(arguments: Sequence[str], finetune_defaults: FinetuneOptions) -> Options:
    subcommand = tyro.conf.subcommand
    commands: Any = (
        Annotated[FinetuneOptions, subcommand("finetune", default=finetune_defaults)]
        | Annotated[PlanOptions, subcommand("plan")]
        | Annotated[GenerateOptions, subcommand("generate")]
        | Annotated[MergeOptions, subcommand("merge")]
        | Annotated[InspectOptions, subcommand("inspect")]
    )
    return tyro.cli(
        commands,
        prog=PROGRAM,
        description="Fine-tune language models with low-rank adapters.",
        args=list(arguments),
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
    )


def _message(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error)
