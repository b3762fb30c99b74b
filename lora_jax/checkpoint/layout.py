"""How a checkpoint lies on disk, and how it is read so that nothing damaged passes.

    about/      JSON: format, config, what each update is, the base's fingerprint; of a step of a
                run also its number, metrics and place in the data; and a SHA-256 of all that
    adapter/    the adapter's arrays, and a checksum of each
    state/      of a step of a run: the other arrays that it goes on with, and their checksums

Orbax writes it under another name and renames it when it is complete.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax.adapters.lora import Axes, Lora
from lora_jax.adapters.whole import Whole
from lora_jax.checkpoint.checksum import checksums
from lora_jax.config import LoraConfig
from lora_jax.tree import Update

FORMAT = 2
ABOUT, ADAPTER, STATE = "about", "adapter", "state"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: unreadable, of another base, or not of this run."""


class UnreadableError(CheckpointError):
    """A checkpoint that is missing, damaged, not ours, or of a format that is not read.

    Attributes:
      earlier: of a run, the last step before it that was read and is whole; None if there is none.
    """

    def __init__(self, message: str, *, earlier: int | None = None):
        super().__init__(message)
        self.earlier = earlier


def local(directory: str | os.PathLike[str]) -> Path:
    """A folder of a file system, as an absolute path.

    Raises:
      ValueError: it is an address: as a path it would name a folder on this machine alone.
    """
    text = os.fspath(directory)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text):
        raise ValueError(
            f"{text}: expected a folder of a file system, got an address. Mount the bucket (for "
            "instance with gcsfuse), and name the folder that it is mounted at."
        )
    return Path(text).absolute()


def describe(
    adapter: Mapping[str, Update], config: LoraConfig, base: Mapping[str, Any]
) -> dict[str, Any]:
    """What `about` says of an adapter.

    Args:
      adapter: path -> update.
      config: the config it was made with.
      base: the fingerprint of its base.
    """
    if callable(config.targets):
        low_rank = tuple(name for name, update in adapter.items() if isinstance(update, Lora))
        fields = {name: getattr(config, name) for name in config.__dataclass_fields__}
        config = LoraConfig(**{**fields, "targets": low_rank, "exclude": ()})
    return {
        "format": FORMAT,
        "config": config.to_dict(),
        "updates": {name: _describe(update) for name, update in adapter.items()},
        "base": dict(base),
    }


def contents(
    about: Mapping[str, Any], adapter: Mapping[str, Update], state: Mapping[str, jax.Array]
) -> ocp.args.Composite:
    """What Orbax is to write: copies, so that the arrays may be donated at once.

    Nothing is waited for: arrays that are still being computed are copied when they are there.

    Args:
      about: JSON values.
      adapter: path -> update.
      state: name -> array; none for an adapter alone.
    """
    items: dict[str, Any] = {ABOUT: ocp.args.JsonSave({**about, "sha256": _digest(about)})}
    both = {ADAPTER: adapter_arrays(adapter), STATE: state}
    places = [x.sharding for x in jax.tree.leaves(both) if isinstance(x, jax.Array)]
    mesh = next((place.mesh for place in places if isinstance(place, NamedSharding)), None)
    for name, arrays in both.items():
        if arrays:
            copies = _copied(arrays, mesh)
            saved = {"arrays": copies, "checksums": checksums(copies)}
            items[name] = ocp.args.StandardSave(saved)
    return ocp.args.Composite(**items)


def adapter_arrays(adapter: Mapping[str, Update]) -> dict[str, Any]:
    """The arrays of an adapter, or what stands for them: path/leaf -> array.

    Raises:
      TypeError: an update is of a kind that cannot be saved.
    """
    return {
        f"{path}/{name}": leaf
        for path, update in adapter.items()
        for name, leaf in _leaves(update).items()
    }


def read_about(directory: Path) -> dict[str, Any]:
    """A checkpoint's description, without its arrays.

    Raises:
      UnreadableError: the folder is missing, is not such a checkpoint, or is of another format.
    """
    file = directory / ABOUT / "metadata"
    if not file.is_file():
        what = "is not an adapter saved by lora_jax" if directory.exists() else "does not exist"
        raise UnreadableError(
            f"{directory} {what}: expected a folder with {file.relative_to(directory)}."
        )
    try:
        about = json.loads(file.read_bytes())
        version, digest = about["format"], about.pop("sha256", None)
        newer = version > FORMAT
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnreadableError(f"{file}: damaged: {error}. Copy the checkpoint again.") from error
    if newer:
        raise UnreadableError(
            f"{directory}: written in format {version}; this version reads format {FORMAT}. "
            "Upgrade lora_jax."
        )
    if version < FORMAT:
        raise UnreadableError(
            f"{directory}: written in format {version}, by a version from before the first "
            f"release; this one reads format {FORMAT}. Save the adapter again."
        )
    if digest != (got := _digest(about)):
        raise UnreadableError(
            f"{file}: damaged: expected SHA-256 {digest}, got {got}. Copy the checkpoint again."
        )
    return about


def read_arrays(
    directory: Path, item: str, like: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """The arrays of one part of a checkpoint, checked.

    Args:
      directory: the checkpoint.
      item: `ADAPTER` or `STATE`.
      like: name -> shape, dtype, and the sharding that it is to have, whatever it was saved from;
        without one, an array is on no particular device.

    Raises:
      UnreadableError: files are missing or damaged; the message says which array, if that is known.
    """
    wanted = {
        "arrays": {name: _target(leaf) for name, leaf in like.items()},
        "checksums": np.zeros(len(like), np.uint32),
    }
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
            args = ocp.args.Composite(**{item: ocp.args.StandardRestore(wanted)})
            found = reader.restore(directory, args=args)[item]
    except Exception as error:
        raise UnreadableError(
            f"{directory}: the checkpoint cannot be read ({type(error).__name__}: {error}). Files "
            "are missing or damaged: restore an earlier checkpoint, or copy this one again."
        ) from error
    # What came as numpy arrays is copied: the caller may donate it.
    arrays = {
        k: v if isinstance(v, jax.Array) else jnp.array(v) for k, v in found["arrays"].items()
    }
    got = np.asarray(checksums(arrays))
    for name, one, two in zip(sorted(arrays), found["checksums"], got, strict=True):
        if one != two:
            raise UnreadableError(
                f"{directory}: {name} is damaged: expected checksum {one:#010x}, got {two:#010x}. "
                "Restore an earlier checkpoint, or copy this one again."
            )
    return arrays


def abstract_adapter(about: Mapping[str, Any]) -> dict[str, Update]:
    """The adapter that a description is of, with shapes in place of arrays."""
    return {
        path: _build(saved, {name: abstract(leaf) for name, leaf in saved["leaves"].items()})
        for path, saved in about["updates"].items()
    }


def with_arrays(adapter: Mapping[str, Any], arrays: Mapping[str, Any]) -> dict[str, Update]:
    """The adapter with other arrays in it, named as by `adapter_arrays`."""
    return {
        path: dataclasses.replace(
            update, **{name: arrays[f"{path}/{name}"] for name in _leaves(update)}
        )
        for path, update in adapter.items()
    }


def kind(leaf: Any) -> dict[str, Any]:
    """Shape and dtype, as `about` says them."""
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}


def abstract(kind: Mapping[str, Any]) -> jax.ShapeDtypeStruct:
    """The inverse of `kind`."""
    return jax.ShapeDtypeStruct(tuple(kind["shape"]), np.dtype(kind["dtype"]))


def _copied(arrays: Mapping[str, Any], mesh: Any) -> dict[str, jax.Array]:
    """Copies where the arrays are; on the mesh of the others, if any, those that are on none."""
    arrays = {name: jnp.asarray(array) for name, array in arrays.items()}
    placed = {name: array.sharding for name, array in arrays.items()}
    for name, array in arrays.items():
        if mesh is not None and not array.committed:
            placed[name] = NamedSharding(mesh, PartitionSpec())
    return jax.device_put(arrays, placed, may_alias=False)


def _target(leaf: jax.ShapeDtypeStruct) -> Any:
    """How Orbax is told where an array goes; a numpy array stands for no device.

    Told nothing, it would put the array where it was saved from, on devices that may not be here.
    """
    if leaf.sharding is not None:
        return leaf
    return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)


def _leaves(update: Update) -> dict[str, Any]:
    if isinstance(update, Lora):
        return {"lora_a": update.lora_a, "lora_b": update.lora_b}
    if isinstance(update, Whole):
        return {"value": update.value}
    raise TypeError(f"an update of type {type(update).__name__} cannot be saved.")


def _describe(update: Update) -> dict[str, Any]:
    leaves = {name: kind(leaf) for name, leaf in _leaves(update).items()}
    if not isinstance(update, Lora):
        return {"kind": "whole", "leaves": leaves}
    return {
        "kind": "lora",
        "axes": dataclasses.asdict(update.axes),
        "scale": update.scale,
        "dropout_rate": update.dropout_rate,
        "leaves": leaves,
    }


def _build(saved: Mapping[str, Any], leaves: Mapping[str, Any]) -> Update:
    if saved["kind"] == "whole":
        return Whole(leaves["value"])
    axes = Axes(**{group: tuple(indices) for group, indices in saved["axes"].items()})
    return Lora(leaves["lora_a"], leaves["lora_b"], axes, saved["scale"], saved["dropout_rate"])


def _digest(about: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
