"""Fills a decoder's parameters from named tensors, one tensor at a time, strictly."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lora_jax.models.config import DecoderConfig
from lora_jax.models.decoder import Params, abstract_params, apply
from lora_jax.models.partition import partition_rules
from lora_jax.quantization.formats import Format
from lora_jax.quantization.quantize import quantize as quantize_params
from lora_jax.quantization.quantized import Quantized, quantize_array
from lora_jax.sharding import params_shardings, place
from lora_jax.tree import flatten

ParamPath = tuple[str, ...]

HEAD = "lm_head/kernel"
COMPUTE_DTYPE = "bfloat16"

# What JAX on a CPU wants of an array that it takes over without a copy.
_ALIGNMENT = 64


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


def plan_params(
    config: DecoderConfig, quantize: Format | None, compute_dtype: str | None = None
) -> Params:
    """Returns what loading makes, without the memory: where weights are quantized, and how.

    Args:
        config: The decoder.
        quantize: Format of every kernel but the head's, or None for plain arrays. The head and
            the embedding stay as they are, as with bitsandbytes.
        compute_dtype: Dtype that quantized weights are formed in; by default bfloat16.

    Returns:
        Params as of `models.decoder.abstract_params`, with abstract `Quantized` leaves.

    >>> config = DecoderConfig(
    ...     vocab_size=64, hidden_size=64, intermediate_size=128, num_layers=2,
    ...     num_heads=2, num_kv_heads=1, head_dim=32, scan_layers=True)
    >>> kernel = plan_params(config, Format())["layers"]["mlp"]["up_proj"]["kernel"]
    >>> kernel.shape, kernel.codes.shape, kernel.scales.shape
    ((2, 64, 128), (2, 32, 128), (2, 128, 1))
    """
    abstract = abstract_params(config)
    if quantize is None:
        return abstract
    return quantize_params(
        functools.partial(apply, config),
        abstract,
        jax.ShapeDtypeStruct((1, 8), jnp.int32),
        exclude=() if config.tied_head else HEAD,
        format=quantize.name,
        block_size=quantize.block_size,
        double_quant=quantize.double_quant,
        compute_dtype=compute_dtype or COMPUTE_DTYPE,
    )


def build_params(
    config: DecoderConfig,
    plan: Params,
    expected: Mapping[str, Slot],
    files: Mapping[str, Path],
    read: Callable[[str, Slot], np.ndarray | Quantized],
    mesh: Mesh | None = None,
) -> Params:
    """Reads every tensor and puts it where it belongs, stacked when the layers are scanned.

    Args:
        config: The decoder; its `dtype` is what the tensors are cast to.
        plan: As from `plan_params`: what is quantized there is quantized while it is read.
        expected: As from `slots`.
        files: The file that each tensor is in, for error messages.
        read: Returns a tensor in the file's orientation, shape already checked; or, where the
            plan has a quantized weight, one layer of it, as it stands in the params.
        mesh: Devices to split them over, as `models.partition.partition_rules` says; by default
            all on one.

    Returns:
        Params with the structure, shapes and dtypes of the plan. Besides them one tensor is in
        memory: in its file's dtype or in float32, and what is made of it; on a mesh, one parameter
        of all layers, too.

    Raises:
        ValueError: If a tensor to be quantized holds a NaN or an infinity, or a parameter cannot be
            split over the mesh; the parameter's path is named, and the file and the tensor.
    """
    places = None
    if mesh is not None:
        shardings = params_shardings(plan, mesh, partition_rules(config))
        places = iter(jax.tree.leaves(shardings))
    names = {slot.path: name for name, slot in expected.items()}
    leaves, structure = flatten(plan)
    # Where one tensor after the other is quantized. Pages that none of them reaches take no memory.
    scratch = _buffer((max(math.prod(slot.shape) for slot in expected.values()),), np.float32)
    built = []
    for path, leaf in leaves:
        keys = tuple(path.split("/"))
        load = functools.partial(_load, config, leaf, expected, files, read, scratch)
        stacked = config.scan_layers and keys[0] == "layers"
        if stacked:
            # One layer after the other into the arrays that JAX then takes over.
            arrays = [_buffer(part.shape, part.dtype) for part in jax.tree.leaves(leaf)]
            for index in range(config.num_layers):
                parts = load(names["layers", str(index), *keys[1:]])
                for array, part in zip(arrays, parts, strict=True):
                    array[index] = part
        else:
            arrays = load(names[keys])
        if places is not None:
            # A copy of what may be a view of the file, which JAX would take over on a CPU.
            arrays = [place(x if stacked else np.array(x), next(places)) for x in arrays]
        elif stacked:
            arrays = [jax.device_put(array, may_alias=True) for array in arrays]
        else:
            # A copy, never a view of the file.
            arrays = [x if isinstance(x, jax.Array) else jnp.array(x) for x in arrays]
        built.append(jax.tree.unflatten(jax.tree.structure(leaf), arrays))
    return structure.unflatten(built)


def _load(config, leaf, expected, files, read, scratch: np.ndarray, name: str) -> list[Any]:
    """The arrays of one tensor, in the order of the planned leaf's."""
    slot = expected[name]
    tensor = read(name, slot)
    if isinstance(tensor, Quantized):
        return jax.tree.leaves(tensor)
    dtype = jnp.dtype(config.dtype)
    if not isinstance(leaf, Quantized):
        return [(tensor.T if slot.is_kernel else tensor).astype(dtype, copy=False)]
    if slot.path[0] == "layers" and config.scan_layers:
        leaf = leaf.along_batch(0, lambda array, _: array, None)
    # In the file's orientation, which is the one of the codes: it costs no transposed copy.
    axes = leaf.transposed((1, 0)).axes
    wide = scratch[: tensor.size].reshape(tensor.shape)
    wide[...] = tensor
    del tensor
    if dtype != np.float32:
        wide[...] = wide.astype(dtype)
    try:
        # JAX reads it where it is, and must be done before the next tensor gets there.
        array = jax.device_put(wide, may_alias=True)
        small = jax.block_until_ready(quantize_array(array, axes, leaf.format, path=leaf.path))
    except ValueError as error:
        raise ValueError(f"{files[name]}: tensor {name}: {error}") from error
    return jax.tree.leaves(small)


def _buffer(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    size = math.prod(shape) * jnp.dtype(dtype).itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(jnp.dtype(dtype)).reshape(shape)


def params_path(config: DecoderConfig, path: ParamPath) -> ParamPath:
    """Returns where a parameter stands in the params, given its unstacked path.

    Args:
        config: The decoder.
        path: With the layer's number: `("layers", "0", ..., "kernel")`.
    """
    stacked = config.scan_layers and path[0] == "layers"
    return ("layers", *path[2:]) if stacked else path


def layer_tensor(config: DecoderConfig, params: Params, path: ParamPath) -> np.ndarray | Quantized:
    """Returns one parameter by its unstacked path, as a host array or quantized weight.

    Args:
        config: The decoder.
        params: Its parameters, stacked or not.
        path: With the layer's number: `("layers", "0", ..., "kernel")`.
    """
    stacked = config.scan_layers and path[0] == "layers"
    node: Any = params
    for key in params_path(config, path):
        node = node[key]
    if isinstance(node, Quantized):
        if stacked:
            node = node.along_batch(0, lambda array, _: array[int(path[1])], None)
        return jax.tree.map(np.asarray, node)
    return np.asarray(node[int(path[1])] if stacked else node)
