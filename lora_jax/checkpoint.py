"""Adapters on disk, with Orbax: the adapter alone, its config, and what base it belongs to."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from lora_jax.adapters.lora import Axes, Lora
from lora_jax.adapters.whole import Whole
from lora_jax.config import LoraConfig
from lora_jax.quantization.formats import Format
from lora_jax.quantization.quantized import Quantized, quantize_array
from lora_jax.tree import Update, leaves_by_path

FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint that cannot be restored: missing, damaged, foreign, or of another base."""


def save(
    directory: str | os.PathLike[str],
    adapter: Mapping[str, Update],
    config: LoraConfig,
    params: Any,
    *,
    overwrite: bool = False,
) -> None:
    """Saves an adapter, without its base.

    The folder appears under its name only when it is complete.

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
    path = Path(directory).absolute()
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists. Choose another folder, or pass overwrite=True.")
    if callable(config.targets):
        low_rank = tuple(name for name, update in adapter.items() if isinstance(update, Lora))
        config = LoraConfig(**{**_fields(config), "targets": low_rank, "exclude": ()})
    about = {
        "format": FORMAT,
        "config": config.to_dict(),
        "updates": {name: _describe(update) for name, update in adapter.items()},
        "base": fingerprint(params),
    }
    args = ocp.args.Composite(
        adapter=ocp.args.StandardSave(_plain(adapter)), about=ocp.args.JsonSave(about)
    )
    with _replacing(path) as new, ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
        writer.save(new, args=args)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A folder to fill beside `path`, which takes its place when it is complete."""
    new, old = (path.with_name(f".{path.name}.{end}") for end in ("new", "old"))
    if old.exists() and not path.exists():
        os.replace(old, path)  # An earlier save was stopped between the two renames below.
    for left in (new, old):
        shutil.rmtree(left, ignore_errors=True)
    try:
        yield new
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    # A folder cannot be renamed over another: the good one steps aside first.
    if path.exists():
        os.replace(path, old)
    os.replace(new, path)
    shutil.rmtree(old, ignore_errors=True)


def restore(
    directory: str | os.PathLike[str], params: Any, *, allow_other_base: bool = False
) -> tuple[dict[str, Update], LoraConfig]:
    """Restores what `save` saved.

    Args:
      directory: the folder.
      params: the base that the adapter will be used with.
      allow_other_base: restore even if the adapter was made for another base.

    Returns:
      `(adapter, config)`.

    Raises:
      CheckpointError: there is no checkpoint, it is damaged, a newer version wrote it, or it was
        made for another base; the message says what differs.
    """
    path = Path(directory).absolute()
    about = read_about(path)
    if not allow_other_base and (differs := difference(about["base"], fingerprint(params))):
        raise CheckpointError(
            f"{path}: the adapter was made for another base. {differs} Load the base it was "
            "trained on, or pass allow_other_base=True if the difference is meant."
        )
    abstract = {
        name: {leaf: _abstract(saved["leaves"][leaf]) for leaf in saved["leaves"]}
        for name, saved in about["updates"].items()
    }
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            args = ocp.args.Composite(adapter=ocp.args.StandardRestore(abstract))
            leaves = checkpointer.restore(path, args=args)["adapter"]
    except Exception as error:
        raise CheckpointError(
            f"{path}: the checkpoint cannot be read ({type(error).__name__}: {error}). Files are "
            "missing or damaged: restore an earlier checkpoint, or copy this one again."
        ) from error
    for name, saved in about["updates"].items():
        for leaf, expected in saved["leaves"].items():
            if (got := _digest(leaves[name][leaf])) != expected["sha256"]:
                raise CheckpointError(
                    f"{path}: {name}/{leaf} is damaged: expected SHA-256 {expected['sha256']}, "
                    f"got {got}. Restore an earlier checkpoint, or copy this one again."
                )
    adapter = {name: _build(saved, leaves[name]) for name, saved in about["updates"].items()}
    return adapter, LoraConfig.from_dict(about["config"])


def read_about(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """A checkpoint's description, without its arrays.

    Returns:
      A dict: `format`, `config` (as `LoraConfig.to_dict`), `updates` (path -> kind, settings, and
      shape and dtype of each leaf) and `base` (fingerprint).

    Raises:
      CheckpointError: the folder is missing, is not such a checkpoint, or is of a newer format.
    """
    path = Path(directory).absolute()
    file = path / "about" / "metadata"
    if not file.is_file():
        what = "is not an adapter saved by lora_jax" if path.exists() else "does not exist"
        raise CheckpointError(f"{path} {what}: expected a folder with {file.relative_to(path)}.")
    try:
        about = json.loads(file.read_text())
        version = about["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: damaged: {error}. Copy the checkpoint again.") from error
    if version > FORMAT:
        raise CheckpointError(
            f"{path}: written in format {version}; this version reads up to {FORMAT}. "
            "Upgrade lora_jax."
        )
    return about


def fingerprint(params: Any) -> dict[str, Any]:
    """What tells one base from another: shapes, dtypes, and a hash over a few values of each leaf.

    Args:
      params: the parameters; leaves may be sharded, only samples are fetched.

    Returns:
      `{"leaves": {path: "dtype[shape]"}, "quantized": {path: its format and axes}, "sha256": hash
      over the samples}`.
    """
    leaves = {k: v for k, v in sorted(leaves_by_path(params).items()) if hasattr(v, "shape")}
    digest = hashlib.sha256()
    for path, leaf in leaves.items():
        digest.update(path.encode())
        for array in jax.tree.leaves(leaf):
            corners = tuple(slice(None, None, max(1, size // 4)) for size in array.shape)
            digest.update(np.asarray(array[corners]).tobytes())
    kinds = {path: f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves.items()}
    quantized = {k: _how_stored(v) for k, v in leaves.items() if isinstance(v, Quantized)}
    return {"leaves": kinds, "quantized": quantized, "sha256": digest.hexdigest()}


def abstract_base(base: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves that a fingerprint is of, without their values.

    Args:
      base: what `fingerprint` returned, also after JSON.

    Returns:
      path -> `jax.ShapeDtypeStruct`, or a `Quantized` of such.
    """
    leaves: dict[str, Any] = {}
    for path, kind in base["leaves"].items():
        dtype, shape = kind.rstrip("]").split("[")
        sizes = tuple(map(int, filter(None, shape.split(", "))))
        leaves[path] = jax.ShapeDtypeStruct(sizes, np.dtype(dtype))
        if stored := base.get("quantized", {}).get(path):
            axes = _axes(stored["axes"])
            format = Format(stored["format"], stored["block_size"], stored["double_quant"])
            leaves[path] = quantize_array(leaves[path], axes, format, path=path)
    return leaves


def _how_stored(leaf: Quantized) -> dict[str, Any]:
    format = leaf.format
    return {
        "format": format.name,
        "block_size": format.block_size,
        "double_quant": format.double_quant,
        "axes": {group: list(axes) for group, axes in dataclasses.asdict(leaf.axes).items()},
    }


def _axes(saved: Mapping[str, Any]) -> Axes:
    return Axes(**{group: tuple(indices) for group, indices in saved.items()})


def difference(saved: dict[str, Any], given: dict[str, Any]) -> str:
    """How one fingerprint differs from another: a sentence, empty if it does not.

    Args:
      saved: the one expected.
      given: the one found.
    """
    ours, theirs = saved["leaves"], given["leaves"]
    for path in sorted({*ours, *theirs}):
        if ours.get(path) != theirs.get(path):
            return (
                f"{path}: expected {ours.get(path, 'no such parameter')}, "
                f"got {theirs.get(path, 'no such parameter')}."
            )
        # Bases saved before there were quantized ones have none.
        formats = [each.get("quantized", {}).get(path) for each in (saved, given)]
        if formats[0] != formats[1]:
            expected, got = (_format_name(stored) for stored in formats)
            return f"{path}: expected {expected}, got {got}."
    same = saved["sha256"] == given["sha256"]
    return "" if same else "Paths, shapes and dtypes agree, but the values differ."


def _fields(config: LoraConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


def _plain(adapter: Mapping[str, Update]) -> dict[str, dict[str, jax.Array]]:
    return {name: _leaves(update) for name, update in adapter.items()}


def _leaves(update: Update) -> dict[str, jax.Array]:
    if isinstance(update, Lora):
        return {"lora_a": update.lora_a, "lora_b": update.lora_b}
    if isinstance(update, Whole):
        return {"value": update.value}
    raise TypeError(f"an update of type {type(update).__name__} cannot be saved.")


def _describe(update: Update) -> dict[str, Any]:
    leaves = {
        name: {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "sha256": _digest(leaf)}
        for name, leaf in _leaves(update).items()
    }
    if not isinstance(update, Lora):
        return {"kind": "whole", "leaves": leaves}
    return {
        "kind": "lora",
        "axes": dataclasses.asdict(update.axes),
        "scale": update.scale,
        "dropout_rate": update.dropout_rate,
        "leaves": leaves,
    }


def _build(saved: dict[str, Any], leaves: dict[str, jax.Array]) -> Update:
    if saved["kind"] == "whole":
        return Whole(leaves["value"])
    axes = _axes(saved["axes"])
    return Lora(leaves["lora_a"], leaves["lora_b"], axes, saved["scale"], saved["dropout_rate"])


def _format_name(stored: dict[str, Any] | None) -> str:
    if stored is None:
        return "plain numbers"
    return str(Format(stored["format"], stored["block_size"], stored["double_quant"]))


def _abstract(leaf: dict[str, Any]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(leaf["shape"]), np.dtype(leaf["dtype"]))


def _digest(array: Any) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
