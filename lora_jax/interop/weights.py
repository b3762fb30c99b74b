"""Fills a decoder's parameters from named tensors, one tensor at a time, strictly."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.models.config import DecoderConfig
from lora_jax.models.decoder import Params, abstract_params

ParamPath = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Slot:
    """One tensor that a weight file must hold.

    Attributes:
        path: Where it goes, with the layer's number: `("layers", "0", ..., "kernel")`.
        shape: Its shape in the file: kernels are (out, in) there and (in, out) here.
    """

    path: ParamPath
    shape: tuple[int, ...]

    @property
    def is_kernel(self) -> bool:
        """Whether the file's tensor is the transposed of ours."""
        return self.path[-1] == "kernel"


def slots(config: DecoderConfig, name_of: Callable[[ParamPath], str]) -> dict[str, Slot]:
    """Returns every tensor that a file of this decoder holds, by its name in the file.

    Args:
        config: The decoder.
        name_of: Gives a parameter path its name in the file.

    Returns:
        Name -> `Slot`, in the order of the layers.
    """
    tree = abstract_params(dataclasses.replace(config, scan_layers=True))
    found = {}
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        path = tuple(str(key.key) for key in key_path)
        layered = path[0] == "layers"
        shape = leaf.shape[1:] if layered else leaf.shape
        shape = shape[::-1] if path[-1] == "kernel" else shape
        for index in range(config.num_layers) if layered else [None]:
            full = path if index is None else ("layers", str(index), *path[1:])
            found[name_of(full)] = Slot(full, shape)
    return found


def check_names(where: Path, expected: Iterable[str], found: Iterable[str]) -> None:
    """Checks that a file holds the expected tensors and no others.

    Raises:
        ValueError: If a tensor is missing or left over, with the file and the names.
    """
    expected, found = set(expected), set(found)
    missing, left_over = sorted(expected - found), sorted(found - expected)
    if not missing and not left_over:
        return
    lines = [f"{where}: the tensors do not fit the model's config."]
    for title, names in (("missing", missing), ("left over", left_over)):
        if names:
            shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            lines.append(f"  {title} ({len(names)}): {shown}")
    lines.append(
        f"  expected {len(expected)} tensors, got {len(found)}. Check that config and weights "
        "belong to the same model, and that the download is complete."
    )
    raise ValueError("\n".join(lines))


def check_shape(where: Path, name: str, expected: tuple[int, ...], got: tuple[int, ...]) -> None:
    """Checks one tensor's shape.

    Raises:
        ValueError: If they differ.
    """
    if expected != got:
        raise ValueError(
            f"{where}: tensor {name}: expected shape {list(expected)} from the config, got "
            f"{list(got)}. Check that config and weights belong to the same model."
        )


def build_params(
    config: DecoderConfig,
    expected: Mapping[str, Slot],
    read: Callable[[str, Slot], np.ndarray],
) -> Params:
    """Reads every tensor and puts it where it belongs, stacked when the layers are scanned.

    Args:
        config: The decoder; its `dtype` is what the tensors are cast to.
        expected: As from `slots`.
        read: Returns a tensor in the file's orientation, shape already checked.

    Returns:
        Params as of `models.decoder.init_params`. Besides them at most one leaf is in memory.
    """
    dtype = jnp.dtype(config.dtype)
    names = {slot.path: name for name, slot in expected.items()}

    def load(path: ParamPath) -> np.ndarray:
        slot = expected[names[path]]
        array = read(names[path], slot)
        return (array.T if slot.is_kernel else array).astype(dtype, copy=False)

    params: Params = {}
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(config)):
        path = tuple(str(key.key) for key in key_path)
        if config.scan_layers and path[0] == "layers":
            array = np.empty(leaf.shape, dtype)
            for index in range(config.num_layers):
                array[index] = load(("layers", str(index), *path[1:]))
        else:
            array = load(path)
        node = params
        for key in path[:-1]:
            node = node.setdefault(key, {})
        # A copy, never a view of the file.
        node[path[-1]] = jnp.array(array)
    return params


def layer_tensor(config: DecoderConfig, params: Params, path: ParamPath) -> np.ndarray:
    """Returns one parameter by its unstacked path, as a host array.

    Args:
        config: The decoder.
        params: Its parameters, stacked or not.
        path: With the layer's number: `("layers", "0", ..., "kernel")`.
    """
    stacked = config.scan_layers and path[0] == "layers"
    node: Any = params
    for key in ("layers", *path[2:]) if stacked else path:
        node = node[key]
    return np.asarray(node[int(path[1])] if stacked else node)
