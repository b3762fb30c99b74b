"""The checkpoints of a training run: one folder a step, written while the run goes on."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from lora_jax.checkpoint import layout
from lora_jax.checkpoint.base import difference, fingerprint
from lora_jax.checkpoint.layout import CheckpointError, UnreadableError
from lora_jax.config import LoraConfig
from lora_jax.tree import Update


def latest_step(directory: str | os.PathLike[str]) -> int | None:
    """The last step that a run has saved completely.

    Args:
      directory: of the run's `Checkpoints`.

    Returns:
      Its number, or None if there is none.
    """
    return max(_steps(layout.local(directory)), default=None)


class Checkpoints:
    """The checkpoints of a training run, to save and to go on from.

    Each is a folder named by its step, which `lora_jax.restore` reads as it does any adapter. A
    folder has its name only when it is complete, so a process may be killed at any moment. With
    several processes all make the same calls, with a directory that all of them see.

    Leave it as a context manager, or with `close`: that waits for the last save.

    Example:
      >>> import tempfile, optax
      >>> import lora_jax as lora
      >>> params, x, tx = {"w": jnp.ones((8, 8))}, jnp.ones((1, 8)), optax.adam(1e-3)
      >>> config = lora.LoraConfig(rank=2, targets="w")
      >>> adapter = lora.init(jax.random.key(0), config, lambda p, x: x @ p["w"], params, x)
      >>> state = {"opt_state": tx.init(adapter), "key": jax.random.key(1)}
      >>> directory = tempfile.mkdtemp()
      >>> with Checkpoints(directory, config, params) as checkpoints:
      ...     checkpoints.save(10, adapter, state, place={"next": 80})
      >>> latest_step(directory)
      10
      >>> with Checkpoints(directory, config, params) as checkpoints:
      ...     step, adapter, state, place = checkpoints.restore((adapter, state))
      >>> step, place
      (10, {'next': 80})
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        config: LoraConfig,
        params: Any,
        *,
        keep: int = 2,
        best: str | None = None,
    ):
        """Opens a directory and changes nothing in it.

        Args:
          directory: made at the first save.
          config: the adapter's.
          params: the base W0. Its fingerprint is computed here, once.
          keep: how many of the last steps to keep, at least 1.
          best: name of a metric. The step with its lowest value is kept too.

        Raises:
          ValueError: `keep` is below 1.
          CheckpointError: the directory is a file, or holds steps of something else.
        """
        if keep < 1:
            raise ValueError(f"Checkpoints: keep: expected at least 1, got {keep}.")
        self._directory = layout.local(directory)
        _check_ours(self._directory)
        self._config, self._base = config, fingerprint(params)
        self._keep, self._best = keep, best
        self._writer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        # Removing a large folder takes longer than a step may wait.
        self._remover = ThreadPoolExecutor(max_workers=1)
        self._opened = False

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def steps(self) -> list[int]:
        """The steps that are there, ascending."""
        return _steps(self._directory)

    def latest(self) -> int | None:
        """The last step that is there, as the first of several processes sees it; None for none.

        A folder on the network may look older to the others, and all must do the same.
        """
        found = latest_step(self._directory)
        if jax.process_count() > 1:
            seen = multihost_utils.broadcast_one_to_all(np.int32(-1 if found is None else found))
            found = None if seen < 0 else int(seen)
        return found

    def save(
        self,
        step: int,
        adapter: Mapping[str, Update],
        state: Any = None,
        *,
        place: Any = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Saves one step, in the background.

        Copies the arrays where they are, and waits for those copies to reach the host; the files
        are written while the caller goes on. The arrays may be donated when this returns. Waits for
        the save before it, and removes steps that are not to be kept.

        Args:
          step: its number.
          adapter: path -> update.
          state: what else is needed to go on, any tree of arrays and keys: the optimizer's state,
            the run's key.
          place: JSON values, such as the state of the data's iterator.
          metrics: name -> value; a step without the one named by `best` is not the best.

        Raises:
          FileExistsError: the step is there already.
          Exception: as Orbax raises it, also about the save before this one: an OSError where the
            disk is full. Nothing that was complete is lost.
        """
        self.wait()
        path = self._path(step)
        if path.exists():
            raise FileExistsError(f"{path} exists. A step is saved once; choose another directory.")
        self._open()
        self._prune()
        arrays = _named(state)
        about = {
            **layout.describe(adapter, self._config, self._base),
            "step": step,
            "metrics": dict(metrics or {}),
            "place": place,
            "state": {name: layout.kind(array) for name, array in arrays.items()},
        }
        self._writer.save(path, args=layout.contents(about, adapter, arrays))

    def restore(
        self, like: tuple[Mapping[str, Update], Any], step: int | None = None
    ) -> tuple[int, dict[str, Update], Any, Any]:
        """Restores what was saved of a step. Waits for the save under way; changes nothing on disk.

        Args:
          like: `(adapter, state)` of the structure, shapes and dtypes that were saved; arrays, or
            `jax.ShapeDtypeStruct`. Leaves are put where its leaves are, on whatever mesh they were
            when they were saved, and those of an offloaded optimizer into the host's memory.
          step: which; None for the last.

        Returns:
          `(step, adapter, state, place)`.

        Raises:
          UnreadableError: the step is missing or damaged, or of another format. The message names
            the last step before it that is whole, and `earlier` holds it.
          CheckpointError: it is of another base, or does not fit `like`.
        """
        self.wait()
        step = self.latest() if step is None else step
        if step is None:
            raise UnreadableError(
                f"{self._directory} holds no checkpoint: the run was stopped before its first save."
            )
        try:
            return step, *self._read(step, *like)
        except UnreadableError as error:
            earlier = self._last_whole(step, like)
            hint = (
                f"The last one before it that is whole is step {earlier}."
                if earlier is not None
                else "There is none before it that is whole."
            )
            raise UnreadableError(f"{error} {hint}", earlier=earlier) from error

    def forget_after(self, step: int) -> None:
        """Removes later steps, for a run that goes on from an earlier one and does them again."""
        self.wait()
        self._remove(later for later in self.steps() if later > step)
        multihost_utils.sync_global_devices(f"lora_jax: forgot after {step}")

    def wait(self) -> None:
        """Waits for the save under way.

        Raises:
          Exception: it failed; as `save` says.
        """
        try:
            self._writer.wait_until_finished()
        except BaseException:
            self._clear()
            raise

    def close(self) -> None:
        """Waits for the save under way, and removes steps that are not to be kept.

        Raises:
          Exception: the last save failed; as `save` says.
        """
        try:
            self.wait()
            if self._opened:  # Or it was only read.
                self._prune()
        finally:
            self._remover.shutdown()
            with contextlib.suppress(Exception):  # Said above.
                self._writer.close()

    def _read(self, step: int, adapter: Mapping[str, Update], state: Any) -> tuple[Any, Any, Any]:
        path = self._path(step)
        about = layout.read_about(path)
        if differs := difference(about["base"], self._base):
            raise CheckpointError(
                f"{path}: the run was made on another base. {differs} Load the base it began with."
            )
        wanted, saved = layout.adapter_arrays(adapter), layout.abstract_adapter(about)
        _check_fits(path, wanted, layout.adapter_arrays(saved))
        likes = _named(state)
        _check_fits(path, likes, {k: layout.abstract(v) for k, v in about["state"].items()})
        arrays = layout.read_arrays(path, layout.ADAPTER, _abstract(wanted))
        others = layout.read_arrays(path, layout.STATE, _abstract(likes)) if likes else {}
        leaves, structure = jax.tree.flatten(state)
        restored = [_rekeyed(others[name], leaf) for name, leaf in zip(likes, leaves, strict=True)]
        return (
            layout.with_arrays(adapter, arrays), structure.unflatten(restored), about["place"],
        )  # fmt: skip

    def _last_whole(self, before: int, like: tuple[Any, Any]) -> int | None:
        for step in reversed(self.steps()):
            if step < before:
                with contextlib.suppress(CheckpointError):
                    self._read(step, *like)
                    return step
        return None

    def _prune(self) -> None:
        """Removes all but the last steps and the best."""
        if jax.process_index() != 0:
            return
        steps = self.steps()
        kept = set(steps[-self._keep :])
        values = {step: self._metric(step) for step in steps}
        if values and (lowest := min(values.values())) < math.inf:
            kept.add(next(step for step in steps if values[step] == lowest))
        self._remove(step for step in steps if step not in kept)

    def _metric(self, step: int) -> float:
        """The one that `best` names; infinite where there is none."""
        if self._best is None:
            return math.inf
        try:
            value = layout.read_about(self._path(step))["metrics"].get(self._best, math.inf)
        except CheckpointError:
            return math.inf
        return math.inf if math.isnan(value) else value

    def _remove(self, steps: Iterable[int]) -> None:
        if jax.process_index() == 0:
            for step in steps:
                # Renamed first: a step that is there is whole, whenever this is stopped.
                gone = self._directory / f".{step}.old"
                shutil.rmtree(gone, ignore_errors=True)
                os.replace(self._path(step), gone)
                self._remover.submit(shutil.rmtree, gone, ignore_errors=True)

    def _open(self) -> None:
        """Makes the directory ready, once, before the first save."""
        if not self._opened:
            self._clear()
            if jax.process_index() == 0:
                self._directory.mkdir(parents=True, exist_ok=True)
        self._opened = True

    def _clear(self) -> None:
        """Removes what is half written: a save that failed, or those of a killed process."""
        if jax.process_index() == 0:
            for pattern in ("*.orbax-checkpoint-tmp*", ".*.old"):
                for left in self._directory.glob(pattern):
                    shutil.rmtree(left, ignore_errors=True)

    def _path(self, step: int) -> Path:
        return self._directory / str(step)


def _steps(directory: Path) -> list[int]:
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal())


def _check_ours(directory: Path) -> None:
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"{directory}: expected a folder, got a file.")
    steps = _steps(directory)
    about = f"{layout.ABOUT}/metadata"
    if steps and not any((directory / str(step) / about).is_file() for step in steps):
        raise CheckpointError(
            f"{directory}: expected steps saved by lora_jax, each with a file {about}, got steps "
            f"of something else: {', '.join(map(str, steps[:5]))}. Choose another directory."
        )


def _named(state: Any) -> dict[str, jax.Array]:
    """The arrays of a tree by their paths, in its order; a key as its raw numbers."""
    leaves = jax.tree.flatten_with_path(state)[0]
    named = {
        jax.tree_util.keystr(path, simple=True, separator="/"): _raw(leaf) for path, leaf in leaves
    }
    if len(named) != len(leaves):
        raise ValueError(
            "Checkpoints: two leaves of the state have the same path. Rename one of them."
        )
    return named


def _raw(leaf: Any) -> Any:
    if not _is_key(leaf):
        return leaf
    if isinstance(leaf, jax.Array):
        return jax.random.key_data(leaf)
    return jax.eval_shape(jax.random.key_data, leaf)


def _rekeyed(array: jax.Array, like: Any) -> jax.Array:
    if not _is_key(like):
        return array
    return jax.random.wrap_key_data(array, impl=jax.random.key_impl(like))


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _abstract(arrays: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes, and the places of those that were put somewhere on purpose."""
    return {
        name: jax.ShapeDtypeStruct(
            array.shape, array.dtype,
            sharding=array.sharding if getattr(array, "committed", True) else None,
        )
        for name, array in arrays.items()
    }  # fmt: skip


def _check_fits(path: Path, wanted: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    if different := sorted(set(wanted) ^ set(saved)):
        raise CheckpointError(
            f"{path}: does not fit: {len(wanted)} arrays expected, {len(saved)} found; the first "
            f"that differs is {different[0]}. {_SAME}"
        )
    for name, leaf in wanted.items():
        expected, got = (f"{a.dtype}{list(a.shape)}" for a in (leaf, saved[name]))
        if expected != got:
            raise CheckpointError(f"{path}: {name}: expected {expected}, got {got}. {_SAME}")


_SAME = "Go on with the adapter and the optimizer that the run was started with."
