"""The folder of a run: what is in it, and how it is written so that a crash leaves it whole.

    run.json            all options, and what the prompts look like
    metrics.jsonl       one object for each step and each evaluation
    adapter/            the adapter, as `lora_jax.checkpoint` saves it
    state.safetensors   what is needed to go on: adapter, optimizer state, step, key, place in data
    results.json        accuracy, loss and sample answers, before and after
    curves.png, .svg    loss and accuracy

Everything is written under another name first and then renamed, so that a full disk or a lost
connection never leaves a part of a file in place of a good one.
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

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from lora_jax import checkpoint
from lora_jax.config import LoraConfig
from lora_jax.training.step import TrainState

RUN = "run.json"
METRICS = "metrics.jsonl"
ADAPTER = "adapter"
STATE = "state.safetensors"
RESULTS = "results.json"
CURVES = ("curves.png", "curves.svg")
_OWN = (RUN, METRICS, ADAPTER, STATE, RESULTS, *CURVES)


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
        """Where the adapter is."""
        return self.path / ADAPTER

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
        held = sorted(entry.name for entry in self.path.iterdir())
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

        Raises:
            DiskFull: there is no room.
        """
        for name in _OWN:
            if (self.path / name).is_dir():
                shutil.rmtree(self.path / name)
            else:
                (self.path / name).unlink(missing_ok=True)
        with self._room("run.json", "nothing has been saved"):
            self.path.mkdir(parents=True, exist_ok=True)
            self._write(RUN, _json(about))

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
        with (
            self._room(METRICS, "the adapter's last save is whole"),
            (self.path / METRICS).open("a", encoding="utf-8") as file,
        ):
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
        """Removes the entries of later steps, which a run that goes on from `step` does again."""
        kept = [entry for entry in self.metrics() if entry["step"] <= step]
        with self._room(METRICS, "the adapter's last save is whole"):
            self._write(METRICS, "".join(json.dumps(entry) + "\n" for entry in kept))

    def save(
        self, state: TrainState, config: LoraConfig, params: Any, *, place: Mapping[str, Any]
    ) -> None:
        """Saves the adapter, and what is needed to go on.

        Args:
            state: of the training.
            config: the adapter's.
            params: the base, for its fingerprint.
            place: the data iterator's state and what else must be known to go on; JSON values.

        Raises:
            DiskFull: there is no room; what was saved before is still there.
        """
        with self._room(f"step {int(state.step)}", self._saved()):
            self._write_state(state, place)
            checkpoint.save(self.adapter, state.adapter, config, params, overwrite=True)

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Reads what `save` saved.

        Args:
            like: a state of the same structure, shapes and dtypes. Leaves are put where its leaves
                are: in the host's memory those of an offloaded optimizer.

        Returns:
            `(state, place)`.

        Raises:
            FolderError: nothing was saved, the file is damaged, or it does not fit.
        """
        file = self.path / STATE
        if not file.is_file():
            raise FolderError(
                f"{file}: not found: the run was stopped before its first save. Start it anew "
                "(--overwrite)."
            )
        try:
            with safetensors.safe_open(file, framework="numpy") as reader:
                place = json.loads((reader.metadata() or {})["place"])
                arrays = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
        except (safetensors.SafetensorError, KeyError, ValueError, OSError) as error:
            raise FolderError(
                f"{file}: damaged or truncated ({error}). The adapter in {self.adapter} is kept "
                "apart from it. Start the run anew (--overwrite), or in another folder."
            ) from error
        leaves, structure = jax.tree.flatten_with_path(_plain(like))
        names = [jax.tree_util.keystr(path) for path, _ in leaves]
        if different := sorted(set(names) ^ set(arrays)):
            raise FolderError(
                f"{file}: does not fit the run's options: {len(names)} arrays expected, "
                f"{len(arrays)} found; the first that differs is {different[0]}. {_SAME}"
            )
        for name, (_, leaf) in zip(names, leaves, strict=True):
            expected = f"{leaf.dtype}{list(leaf.shape)}"
            if (got := f"{arrays[name].dtype}{list(arrays[name].shape)}") != expected:
                raise FolderError(f"{file}: {name}: expected {expected}, got {got}. {_SAME}")
        plain = structure.unflatten(
            [_placed(arrays[name], leaf) for name, (_, leaf) in zip(names, leaves, strict=True)]
        )
        key = jax.random.wrap_key_data(plain.key, impl=jax.random.key_impl(like.key))
        return dataclasses.replace(plain, key=key), place

    def write(self, name: str, text: str) -> None:
        """Writes one of the run's text files.

        Raises:
            DiskFull: there is no room.
        """
        with self._room(name, self._saved()):
            self._write(name, text)

    def _write_state(self, state: TrainState, place: Mapping[str, Any]) -> None:
        leaves, _ = jax.tree.flatten_with_path(_plain(state))
        arrays = {jax.tree_util.keystr(path): np.asarray(leaf, order="C") for path, leaf in leaves}
        new = self.path / f"{STATE}.new"
        try:
            safetensors.numpy.save_file(arrays, new, metadata={"place": json.dumps(place)})
            with new.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(new, self.path / STATE)
        finally:
            new.unlink(missing_ok=True)

    def _write(self, name: str, text: str) -> None:
        new = self.path / f"{name}.new"
        try:
            with new.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, self.path / name)
        finally:
            new.unlink(missing_ok=True)

    def _saved(self) -> str:
        if self.adapter.exists():
            return f"the adapter saved before is whole, in {self.adapter}"
        return "no adapter has been saved yet"

    @contextlib.contextmanager
    def _room(self, what: str, saved: str) -> Iterator[None]:
        """Turns a full disk, in whatever way a library reports it, into `DiskFull`."""
        try:
            yield
        except Exception as error:
            full = getattr(error, "errno", None) == errno.ENOSPC
            if not full and os.strerror(errno.ENOSPC).lower() not in str(error).lower():
                raise
            raise DiskFull(
                errno.ENOSPC,
                f"{self.path}: no room on the disk: {what} was not saved; {saved}. Make room, then "
                "go on with --resume",
            ) from error


_SAME = "Give the options that the run was started with, or start it anew (--overwrite)."


def _plain(state: TrainState) -> TrainState:
    """With the key as its raw numbers."""
    return dataclasses.replace(state, key=jax.random.key_data(state.key))


def _placed(array: np.ndarray, like: jax.Array) -> jax.Array:
    """A copy, since the state is donated; on no particular device if `like` is on none."""
    copy = jnp.array(array)
    return jax.device_put(copy, like.sharding) if like.committed else copy


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def _finite(entry: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: such a number becomes its name."""
    return {
        key: str(value) if isinstance(value, float) and not np.isfinite(value) else value
        for key, value in entry.items()
    }
