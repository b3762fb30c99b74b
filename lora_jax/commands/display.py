"""What the commands print."""

from __future__ import annotations

import itertools
import re
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from lora_jax.summaries import Row, Summary


def summary_table(summary: Summary) -> Table:
    """An adapter's summary, in which weights that differ in their layer's number share a row."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    # Where the terminal is too narrow, the paths are broken, and no number.
    table.add_column("weights", overflow="fold")
    # Room is scarce: where nothing is quantized, every weight has the bits of its dtype.
    quantized = any(row.bits < 16 for row in summary.rows)
    for name in ("shape", "axes", *["bits"] * quantized, "rank", "trainable", "share"):
        right = name not in ("shape", "axes")
        table.add_column(name, justify="right" if right else "left", no_wrap=True)
    for pattern, rows in grouped(summary.rows):
        first, trainable = rows[0], sum(row.trainable for row in rows)
        table.add_row(
            pattern if len(rows) == 1 else f"{pattern} ({len(rows)})",
            " x ".join(map(str, first.shape)),
            first.axes,
            *[f"{first.bits:.4g}"] * quantized,
            "-" if first.rank is None else str(first.rank),
            f"{trainable:,}",
            f"{first.share:.2%}",
        )
    table.caption = summary.totals
    table.caption_justify = "left"
    return table


def grouped(rows: tuple[Row, ...]) -> list[tuple[str, list[Row]]]:
    """Rows that are alike but for numbers in their paths, by the path with `*` for the numbers."""

    def alike(row: Row) -> tuple[Any, ...]:
        pattern = re.sub(r"(?<=/)\d+(?=/)", "*", row.path)
        return pattern, row.shape, row.axes, row.rank or 0

    groups = itertools.groupby(sorted(rows, key=alike), key=alike)
    return [
        (members[0].path if len(members) == 1 else kind[0], members)
        for kind, group in groups
        if (members := list(group))
    ]


def printable(text: str) -> str:
    r"""A text on one line, without what would command the terminal: models write anything.

    Example:
        >>> printable("two\nlines \x1b[31mred")
        'two lines [31mred'
    """
    return "".join(c for c in " ".join(text.split()) if c.isprintable())


def progress_bar(console: Console) -> Progress:
    """Steps done, loss, tokens a second, time left."""
    return Progress(
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  {task.fields[speed]:.0f} tokens/s"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )
