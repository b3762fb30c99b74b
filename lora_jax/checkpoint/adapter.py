"""An adapter on disk, with Orbax: alone, with its config, and what base it belongs to."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from lora_jax.checkpoint import layout
from lora_jax.checkpoint.base import difference, fingerprint
from lora_jax.checkpoint.layout import CheckpointError
from lora_jax.config import LoraConfig
from lora_jax.sharding import adapter_shardings
from lora_jax.tree import Update, leaves_by_path


def save(
    directory: str | os.PathLike[str],
    adapter: Mapping[str, Update],
    config: LoraConfig,
    params: Any,
    *,
    overwrite: bool = False,
) -> None:
    """Saves an adapter, without its base.

    The folder appears under its name only when it is complete. With several processes all call
    this, with a folder that all of them see, and each writes its own shards.

    Args:
      directory: the folder to make.
      adapter: path -> update.
      config: the config it was made with. Targets given as a function are saved as the paths that
        the adapter has.
      params: the base W0; only a fingerprint of it is stored.
      overwrite: replace a folder that is there already, which stays until the new one is complete.

    Raises:
      FileExistsError: the folder exists and `overwrite` is not set.
    """
    path = layout.local(directory)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists. Choose another folder, or pass overwrite=True.")
    about = layout.describe(adapter, config, fingerprint(params))
    with replacing(path) as new, ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
        writer.save(new, args=layout.contents(about, adapter, {}))


def restore(
    directory: str | os.PathLike[str], params: Any, *, allow_other_base: bool = False
) -> tuple[dict[str, Update], LoraConfig]:
    """Restores what `save` saved, or the adapter of one step of a run.

    The adapter lies as its base does, by `lora_jax.adapter_shardings`, however it lay when it was
    saved. On a base that is on no mesh it is on no particular device.

    Args:
      directory: the folder.
      params: the base that the adapter will be used with.
      allow_other_base: restore even if the adapter was made for another base.

    Returns:
      `(adapter, config)`.

    Raises:
      CheckpointError: there is no checkpoint, it is damaged, another version wrote it, or it was
        made for another base; the message says what differs.
    """
    path = layout.local(directory)
    about = layout.read_about(path)
    if not allow_other_base and (differs := difference(about["base"], fingerprint(params))):
        raise CheckpointError(
            f"{path}: the adapter was made for another base. {differs} Load the base it was "
            "trained on, or pass allow_other_base=True if the difference is meant."
        )
    adapter = layout.abstract_adapter(about)
    arrays = layout.read_arrays(
        path, layout.ADAPTER, layout.adapter_arrays(_placed(adapter, params))
    )
    return layout.with_arrays(adapter, arrays), LoraConfig.from_dict(about["config"])


def read_about(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """A checkpoint's description, without its arrays.

    Returns:
      A dict: `format`, `config` (as `LoraConfig.to_dict`), `updates` (path -> kind, settings, and
      shape and dtype of each leaf) and `base` (fingerprint); of a step of a run also `step`,
      `metrics`, `place` and `state`.

    Raises:
      CheckpointError: the folder is missing, is not such a checkpoint, is damaged, or is of
        another format.
    """
    return layout.read_about(layout.local(directory))


def export(directory: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Copies the adapter of one step of a run, without what only going on needs.

    Args:
      directory: the step's folder.
      target: the folder to make; one that is there already stays until the new one is complete.

    Raises:
      OSError: it cannot be copied.
    """
    source = layout.local(directory)
    with replacing(layout.local(target)) as new:
        if jax.process_index() == 0:
            others = lambda folder, _: {layout.STATE} if Path(folder) == source else set()  # noqa: E731
            shutil.copytree(source, new, ignore=others)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A folder to fill beside `path`, which takes its place when it is complete."""
    new, old = (path.with_name(f".{path.name}.{end}") for end in ("new", "old"))
    first = jax.process_index() == 0
    if first:
        if old.exists() and not path.exists():
            os.replace(old, path)  # An earlier save was stopped between the two renames below.
        for left in (new, old):
            shutil.rmtree(left, ignore_errors=True)
    multihost_utils.sync_global_devices(f"lora_jax: cleared {path}")
    try:
        yield new
    except BaseException:
        if first:
            shutil.rmtree(new, ignore_errors=True)
        raise
    if first:
        # A folder cannot be renamed over another: the good one steps aside first.
        if path.exists():
            os.replace(path, old)
        os.replace(new, path)
        shutil.rmtree(old, ignore_errors=True)
    multihost_utils.sync_global_devices(f"lora_jax: saved {path}")


def _placed(adapter: Mapping[str, Update], params: Any) -> dict[str, Update]:
    """The abstract adapter, with shardings where its base has them."""
    bases = leaves_by_path(params)
    placed: dict[str, Update] = dict(adapter)
    for path, update in adapter.items():
        base = jax.tree.map(lambda array: getattr(array, "sharding", None), bases.get(path))
        if any(isinstance(sharding, NamedSharding) for sharding in jax.tree.leaves(base)):
            shardings = adapter_shardings({path: base}, {path: update})[path]
            placed[path] = jax.tree.map(
                lambda leaf, sharding: jax.ShapeDtypeStruct(
                    leaf.shape, leaf.dtype, sharding=sharding
                ),
                update, shardings,
            )  # fmt: skip
    return placed
