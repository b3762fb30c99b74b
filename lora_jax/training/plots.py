"""The curves of a run as a picture."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

# Okabe and Ito's palette: told apart with any kind of colour vision, and in print by lightness.
_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#8C8C8C"


def curves(entries: Sequence[Mapping[str, Any]], *, title: str, accuracy_of: str) -> Figure:
    """Loss and accuracy over the steps.

    Args:
        entries: of `metrics.jsonl`, in order.
        title: above both.
        accuracy_of: what is counted, such as `"answers"` or `"tokens"`.
    """
    train = [(e["step"], float(e["loss"])) for e in entries if e["kind"] == "train"]
    held = [e for e in entries if e["kind"] == "evaluation"]
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    if train:
        steps, losses = (np.array(values) for values in zip(*train, strict=True))
        loss.plot(steps, losses, color=_GREY, alpha=0.5, linewidth=0.8, label="each step")
        width = max(1, len(losses) // 15)
        if width > 1 and np.isfinite(losses).all():
            mean = np.convolve(losses, np.ones(width) / width, mode="valid")
            label = f"mean of {width} steps"
            loss.plot(steps[width - 1 :], mean, color=_BLUE, linewidth=2, label=label)
    at = [e["step"] for e in held]
    loss.plot(at, [float(e["loss"]) for e in held], "s--", color=_ORANGE, label="held out")
    loss.set(xlabel="step", ylabel="loss (nats per learned token)")
    if all(float(e["loss"]) > 0 for e in entries):
        # The first steps are many times as high as all that follow.
        loss.set_yscale("log")
        loss.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        loss.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        loss.yaxis.set_minor_formatter(NullFormatter())
    loss.legend(frameon=False)
    accuracy.plot(at, [e["accuracy"] for e in held], "s-", color=_ORANGE)
    for e in held[:1] + held[1:][-1:]:
        accuracy.annotate(
            f"{e['accuracy']:.1%}",
            (e["step"], e["accuracy"]),
            textcoords="offset points",
            xytext=(6, -14) if e is held[0] else (0, 9),
            ha="left" if e is held[0] else "right",
        )
    accuracy.set(xlabel="step", ylabel=f"held-out {accuracy_of} right", ylim=(0, 1.05))
    accuracy.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    for axes in (loss, accuracy):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    return figure


def save(figure: Figure, paths: Sequence[Path]) -> None:
    """Writes the figure to each path, in the format of its suffix; a path is whole or untouched."""
    for path in paths:
        new = path.with_name(f"new-{path.name}")
        try:
            # Without a date or random ids, so that the same run writes the same bytes.
            metadata = {"Date": None} if path.suffix == ".svg" else None
            figure.savefig(new, dpi=150, metadata=metadata)
            os.replace(new, path)
        finally:
            new.unlink(missing_ok=True)
