"""The folder of a run: what is in it, and how it is written so that a crash leaves it whole.

    run.json            all options, and what the prompts look like
    metrics.jsonl       one object for each step and each evaluation
    checkpoints/STEP/   what is needed to go on after that step; the last ones, and the best
    adapter/            the adapter alone, of the last step when the run ended or was stopped
    results.json        accuracy, loss and sample answers, before and after
    curves.png, .svg    loss and accuracy

Everything is written under another name first and then renamed, so that a full disk, a lost
connection or a killed process never leaves a part of a file in place of a good one. Of several
processes the first writes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.checkpoint import latest_step
from lora_jax.training.hosts import is_first, wait_for_all

RUN = "run.json"
METRICS = "metrics.jsonl"
ADAPTER = "adapter"
CHECKPOINTS = "checkpoints"
RESULTS = "results.json"
CURVES = ("curves.png", "curves.svg")
_OWN = (METRICS, CHECKPOINTS, ADAPTER, RESULTS, *CURVES)


class FolderError(ValueError):
    """The output folder cannot be used; the message says why, and what to do."""


class DiskFull(OSError):
    """There was no room to write something; the message says what was not saved and what is."""


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """One run's files.

    Attributes:
        path: the folder.
    """

    path: Path

    @property
    def adapter(self) -> Path:
        """Where the adapter is when the run has ended."""
        return self.path / ADAPTER

    @property
    def checkpoints(self) -> Path:
        """Where the run's checkpoints are."""
        return self.path / CHECKPOINTS

    def check_new(self, *, overwrite: bool) -> None:
        """Checks that a run may be written here, before anything is loaded; writes nothing.

        Raises:
            FolderError: the folder holds a run and `overwrite` is not set, or it holds other
                files, or is a file.
        """
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise FolderError(f"{self.path}: expected a folder, got a file. Choose another output.")
        # A process that was killed may have left a file that it had not renamed yet.
        held = sorted(x.name for x in self.path.iterdir() if x.name != f"{RUN}.new")
        if RUN in held and not overwrite:
            raise FolderError(
                f"{self.path} already holds a run. Go on with it (--resume), replace it "
                "(--overwrite), or choose another folder (--out)."
            )
        if held and RUN not in held:
            raise FolderError(
                f"{self.path}: expected a new or empty folder, or one with a run in it, got one "
                f"that holds {', '.join(held[:5])}. Choose another folder (--out)."
            )

    def begin(self, about: Mapping[str, Any]) -> None:
        """Removes an earlier run's files and writes `run.json`.

        Of several processes all call this, and go on when it is done.

        Raises:
            DiskFull: there is no room.
        """
        if is_first():
            for name in _OWN:
                if (self.path / name).is_dir():
                    shutil.rmtree(self.path / name)
                else:
                    (self.path / name).unlink(missing_ok=True)
            with self.room("run.json", "nothing has been saved"):
                self.path.mkdir(parents=True, exist_ok=True)
        self.describe(about)
        wait_for_all(f"begin {self.path}")
        if not (self.path / RUN).is_file():
            raise FolderError(
                f"{self.path}: expected a folder that all hosts see, but what the first wrote is "
                "not here. Choose one on storage that they share (--out)."
            )

    def describe(self, about: Mapping[str, Any]) -> None:
        """Writes `run.json`.

        Raises:
            DiskFull: there is no room.
        """
        self.write(RUN, json.dumps(about, indent=2, ensure_ascii=False) + "\n")

    def about(self) -> dict[str, Any]:
        """What `begin` wrote.

        Raises:
            FolderError: there is no run here, or its description is damaged.
        """
        file = self.path / RUN
        if not file.is_file():
            raise FolderError(
                f"{self.path} holds no run to go on with: expected a file {RUN} in it. Start one "
                "without --resume, or name the run's folder (--out)."
            )
        try:
            values = json.loads(file.read_text("utf-8"))
        except (ValueError, UnicodeDecodeError) as error:
            raise FolderError(f"{file}: damaged: {error}. Start the run anew.") from error
        if not isinstance(values, dict):
            raise FolderError(f"{file}: expected an object, got {type(values).__name__}.")
        return values

    def log(self, entry: Mapping[str, Any]) -> None:
        """Appends one object to `metrics.jsonl`.

        Raises:
            DiskFull: there is no room.
        """
        if not is_first():
            return
        with self.room(METRICS), (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(_finite(entry)) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """The entries of `metrics.jsonl` so far; a last line that was cut off is left out."""
        file = self.path / METRICS
        if not file.is_file():
            return []
        entries = []
        for line in file.read_text("utf-8").splitlines():
            with contextlib.suppress(ValueError):
                entries.append(json.loads(line))
        return entries

    def forget_after(self, step: int) -> None:
        """Removes the entries of what a run does again that goes on from `step`.

        From step 0 that is everything: an evaluation comes before the first step.

        Raises:
            DiskFull: there is no room.
        """
        kept = [entry for entry in self.metrics() if entry["step"] <= step] if step else []
        self.write(METRICS, "".join(json.dumps(entry) + "\n" for entry in kept))

    def write(self, name: str, text: str) -> None:
        """Writes one of the run's text files.

        Raises:
            DiskFull: there is no room.
        """
        if not is_first():
            return
        new = self.path / f"{name}.new"
        try:
            with self.room(name), new.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, self.path / name)
        finally:
            new.unlink(missing_ok=True)

    @contextlib.contextmanager
    def room(self, what: str, saved: str | None = None) -> Iterator[None]:
        """Turns a full disk, in whatever way a library reports it, into `DiskFull`.

        Args:
            what: what is written.
            saved: what is on the disk all the same; by default it says where the last checkpoint
                is.
        """
        try:
            yield
        except Exception as error:
            full = getattr(error, "errno", None) == errno.ENOSPC
            if not full and os.strerror(errno.ENOSPC).lower() not in str(error).lower():
                raise
            raise DiskFull(
                errno.ENOSPC,
                f"{self.path}: no room on the disk: {what} was not saved; "
                f"{saved or self._saved()}. Make room, then go on with --resume",
            ) from error

    def _saved(self) -> str:
        if (step := latest_step(self.checkpoints)) is not None:
            return f"what was saved before is whole, in {self.checkpoints / str(step)}"
        return "nothing has been saved yet"


def _finite(entry: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: such a number becomes its name."""
    return {
        key: str(value) if isinstance(value, float) and not np.isfinite(value) else value
        for key, value in entry.items()
    }
