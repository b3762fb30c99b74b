"""`lora-jax inspect`: what an adapter is, without loading its base."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from lora_jax.checkpoint import abstract_adapter, abstract_base
from lora_jax.commands import trained
from lora_jax.commands.display import summary_table
from lora_jax.commands.errors import reading_input
from lora_jax.summaries import summary


@dataclasses.dataclass(frozen=True)
class InspectOptions:
    """Show an adapter's settings, its base, and what it trains.

    Attributes:
        adapter: Folder of a run, or of an adapter.
    """

    adapter: Path


def inspect(options: InspectOptions, console: Console) -> None:
    """Runs `lora-jax inspect`.

    Raises:
        InputError, CheckpointError: there is no adapter, or it is damaged.
    """
    with reading_input():
        found = trained.find(options.adapter)
    base = found.about["base"]
    layout = "stacked" if found.scanned else "separate"
    console.print(f"Adapter: {escape(str(found.path))}")
    console.print(
        f"Base: {escape(found.run.get('model', 'not named'))}, {found.dtype}, {layout} layers, "
        f"fingerprint {base['sha256'][:16]}"
    )
    if "step" in found.about:
        console.print(f"Saved after step {found.about['step']}")
    if "prompt" in found.run:
        console.print(f"Prompts: {escape(json.dumps(found.run['prompt'], ensure_ascii=False))}")
    console.print("Config:")
    for name, value in found.about["config"].items():
        console.print(f"  {name}: {escape(json.dumps(value))}")
    adapter = abstract_adapter(found.about)
    console.print(summary_table(summary(abstract_base(base), adapter)))
