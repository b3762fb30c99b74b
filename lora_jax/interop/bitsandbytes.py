"""4-bit weights as bitsandbytes stores them in safetensors, to and from `Quantized`.

The file's weight is torch's (out, in), flattened: two codes a byte, the even element in the high
bits, blocks in that order. Where blocks end with rows, these are our codes, transposed.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.lora import Axes
from lora_jax.interop.weights import Slot
from lora_jax.models.config import DecoderConfig
from lora_jax.models.decoder import Params, abstract_params
from lora_jax.quantization.formats import CODES, NESTED_BLOCK, Format, dynamic_map
from lora_jax.quantization.quantized import Nested, Quantized, quantize_array
from lora_jax.tree import flatten

DTYPES = ("float32", "bfloat16", "float16")

_KERNEL = Axes((), (0,), (1,))
_STACKED = Axes((0,), (1,), (2,))
_STATE = "quant_state.bitsandbytes__"
# A state is about 170 bytes of JSON; what is much longer is not read.
_LONGEST_STATE = 4096
_AGAIN = "The file is damaged or its parts belong to different weights: download it again."

Home = Mapping[str, tuple[Path, Any]]
"""The file that each tensor is in, and what reads that file."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """A 4-bit weight in a file, all sizes checked, nothing read but its description.

    Attributes:
        format: How it is stored.
        shape: (out, in).
        dtype: What it was quantized from.
        offset: Mean of its scales if they are quantized, else None.
    """

    format: Format
    shape: tuple[int, int]
    dtype: str
    offset: float | None


def compute_dtype_of(values: Mapping[str, Any], where: Path) -> str | None:
    """Returns the dtype in which a `config.json` has the 4-bit weights of bitsandbytes formed.

    Args:
        values: The parsed file.
        where: The file, for error messages.

    Returns:
        The dtype, or None if the model is not quantized, or by another method.

    Raises:
        ValueError: If bitsandbytes did it in a way that is not covered.
    """
    found = values.get("quantization_config")
    if not isinstance(found, Mapping) or found.get("quant_method") != "bitsandbytes":
        return None
    field = f"{where}: quantization_config"
    if found.get("load_in_4bit") is not True:
        raise ValueError(
            f"{field}: expected load_in_4bit, got {found.get('load_in_4bit')!r}: bitsandbytes' "
            "8-bit checkpoints are not covered. Load the original weights, with "
            'quantize=Format("int8") for 8 bits.'
        )
    storage = found.get("bnb_4bit_quant_storage", "uint8")
    if storage != "uint8":
        raise ValueError(
            f"{field}: bnb_4bit_quant_storage={storage!r} is not covered; expected 'uint8'. Load "
            "the original weights, with quantize=Format()."
        )
    dtype = found.get("bnb_4bit_compute_dtype", "float32")
    if dtype not in DTYPES:
        raise ValueError(
            f"{field}: bnb_4bit_compute_dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}."
        )
    return dtype


def find(home: Home, expected: Mapping[str, Slot]) -> dict[str, Stored]:
    """Finds a checkpoint's 4-bit weights and checks that each is complete.

    Args:
        home: Where each tensor is.
        expected: The decoder's tensors by their names in the file.

    Returns:
        Name of the weight -> what is stored.

    Raises:
        ValueError: If a part is missing or of the wrong size, a description is not understood, or
            a block would span two rows.
    """
    kernels = {name for name, slot in expected.items() if slot.is_kernel}
    groups: dict[str, set[str]] = {}
    for name in home:
        module, found, part = name.partition(".weight.")
        weight = f"{module}.weight" if found else name
        if weight in kernels and found:
            groups.setdefault(weight, set()).add(part)
        elif weight in kernels and _header(home, weight)[0] == "U8":
            groups.setdefault(weight, set())
    if not groups:
        raise ValueError(
            f"{next(iter(home.values()))[0].parent}: config.json says load_in_4bit, so expected "
            "4-bit weights, got none: no tensor is named *.weight.quant_state.*. Take "
            "quantization_config out of config.json, and quantize while loading instead."
        )
    return {
        weight: _stored(home, weight, parts, expected[weight]) for weight, parts in groups.items()
    }


def names_of(weights: Mapping[str, Stored]) -> set[str]:
    """Returns the tensors that 4-bit weights have besides themselves.

    >>> sorted(names_of({"w": Stored(Format(double_quant=False), (64, 64), "float32", None)}))
    ['w.absmax', 'w.quant_map', 'w.quant_state.bitsandbytes__nf4']
    """
    return {
        f"{weight}.{part}"
        for weight, stored in weights.items()
        for part in (*_sizes(stored), f"{_STATE}{stored.format.name}")
        if part
    }


def plan_params(
    config: DecoderConfig,
    expected: Mapping[str, Slot],
    weights: Mapping[str, Stored],
    compute_dtype: str,
) -> Params:
    """Returns what loading makes, as `weights.plan_params` does for plain files.

    Args:
        config: The decoder.
        expected: As from `slots`.
        weights: As from `find`.
        compute_dtype: Dtype in which weights are formed.

    Returns:
        Params as of `models.decoder.abstract_params`, with abstract `Quantized` leaves.

    Raises:
        ValueError: If layers that are to be stacked are not stored alike.
    """
    names = {slot.path: name for name, slot in expected.items()}
    leaves, structure = flatten(abstract_params(config))
    planned = []
    for path, leaf in leaves:
        keys = tuple(path.split("/"))
        stacked = config.scan_layers and keys[0] == "layers"
        numbers = [str(index) for index in range(config.num_layers)]
        places = [("layers", number, *keys[1:]) for number in numbers] if stacked else [keys]
        formats = [
            weights[names[place]].format if names[place] in weights else None for place in places
        ]
        for place, format in zip(places, formats, strict=True):
            if format != formats[0]:
                raise ValueError(
                    f"{path}: layers stored in different ways cannot be stacked: "
                    f"{names[places[0]]} is {formats[0] or 'not quantized'}, {names[place]} is "
                    f"{format or 'not quantized'}. Load with scan_layers=False."
                )
        if formats[0] is not None:
            axes = _STACKED if stacked else _KERNEL
            leaf = quantize_array(leaf, axes, formats[0], compute_dtype=compute_dtype, path=path)
        planned.append(leaf)
    return structure.unflatten(planned)


def read_weight(home: Home, name: str, stored: Stored) -> Quantized:
    """Reads one 4-bit weight: the file's codes and scales, as they are.

    Args:
        home: Where each tensor is.
        name: The weight's name.
        stored: As from `find`.

    Returns:
        The weight as (in, out), its arrays on the host.

    Raises:
        ValueError: If the file's tables are not the published ones, or a scale is not finite.
    """
    parts: dict[str, Any] = {}
    for part in _sizes(stored):
        _, reader = home[_full(name, part)]
        parts[part] = reader.get_tensor(_full(name, part))
    _check_values(home, name, stored, parts)
    out, size = stored.shape
    nested = None
    if stored.offset is not None:
        offset: Any = np.asarray(stored.offset, np.float32)
        nested = Nested(parts["nested_absmax"], offset)
    return Quantized(
        parts[""].reshape(out, size // 2).T,
        parts["absmax"].reshape(out, -1),
        nested,
        _KERNEL,
        jax.ShapeDtypeStruct((size, out), jnp.dtype(stored.dtype)),
        stored.format,
        "float32",
    )


def tensors_of(name: str, weight: Quantized) -> dict[str, np.ndarray]:
    """Returns the tensors that bitsandbytes stores for a weight.

    Args:
        name: The weight's name in the file.
        weight: (in, out), not stacked, its arrays on the host.

    Returns:
        Name -> array.

    Raises:
        ValueError: If bitsandbytes has no such weights; the parameter's path is named.

    >>> import jax
    >>> small = quantize_array(np.eye(64, dtype=np.float32), Axes((), (0,), (1,)), Format())
    >>> tensors = tensors_of("w", jax.tree.map(np.asarray, small))
    >>> tensors["w"].shape, tensors["w.absmax"].shape, tensors["w.nested_absmax"].shape
    ((2048, 1), (64,), (1,))
    """
    format = weight.format
    problem = None
    if not format.in_four_bits:
        problem = f"is {format}, but its checkpoints hold nf4 and fp4"
    elif weight.axes != _KERNEL:
        problem = f"is quantized along axes {weight.axes}, but only (in, out) kernels can be"
    elif weight.shape[0] % format.block_size:
        problem = (
            f"has {weight.shape[0]} inputs, no multiple of the block size {format.block_size}, "
            "so its last blocks are padded, while bitsandbytes' run on into the next row"
        )
    if problem is not None:
        raise ValueError(
            f"params: {weight.path}: cannot be written for bitsandbytes: it {problem}. Write "
            "plain arrays: save_pretrained(..., params=lora_jax.dequantize(params))."
        )
    state: dict[str, Any] = {
        "quant_type": format.name,
        "blocksize": format.block_size,
        "dtype": jnp.dtype(weight.dtype).name,
        "shape": [weight.shape[1], weight.shape[0]],
    }
    parts = {
        "": weight.codes.T.reshape(-1, 1),
        "absmax": weight.scales.reshape(-1),
        "quant_map": np.asarray(CODES[format.name], np.float32),
    }
    if weight.nested is not None:
        parts["nested_absmax"] = weight.nested.absmax
        parts["nested_quant_map"] = dynamic_map()
        state["nested_blocksize"] = NESTED_BLOCK
        state["nested_dtype"] = "float32"
        state["nested_offset"] = float(weight.nested.mean)
    parts[f"{_STATE}{format.name}"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return {_full(name, part): np.ascontiguousarray(array) for part, array in parts.items()}


def quantization_config(params: Params, plain: Iterable[str]) -> dict[str, Any] | None:
    """Returns the `quantization_config` of a `config.json`, or None without 4-bit weights.

    Args:
        params: Parameters with `Quantized` kernels.
        plain: Names, as in the file, of the kernels that are plain arrays.

    Raises:
        ValueError: If the weights are in several formats: the config has room for one.
    """
    found = {
        (leaf.format, leaf.compute_dtype): path
        for path, leaf in flatten(params)[0]
        if isinstance(leaf, Quantized)
    }
    if not found:
        return None
    if len(found) > 1:
        (first, one), (second, other), *_ = found.items()
        raise ValueError(
            f"params: expected all weights in one format, got {first[0]}, formed in {first[1]}, "
            f"at {one} and {second[0]}, formed in {second[1]}, at {other}; config.json has room "
            "for one. Write plain arrays: save_pretrained(..., "
            "params=lora_jax.dequantize(params))."
        )
    ((format, compute_dtype),) = found
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": format.name,
        "bnb_4bit_use_double_quant": format.double_quant,
        "bnb_4bit_compute_dtype": compute_dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": [name.removesuffix(".weight") for name in plain],
    }


def _full(weight: str, part: str) -> str:
    return f"{weight}.{part}" if part else weight


def _check_values(home: Home, name: str, stored: Stored, parts: Mapping[str, np.ndarray]) -> None:
    tables = {"quant_map": np.asarray(CODES[stored.format.name], np.float32)}
    if stored.offset is not None:
        tables["nested_quant_map"] = dynamic_map()
    for part, table in tables.items():
        # Up to a few units in the last place: other builds of torch round the map otherwise.
        got = parts[part]
        if not np.allclose(got, table, rtol=2**-21, atol=0):
            at = int(np.argmax(np.abs(got - table)))
            raise ValueError(
                f"{home[_full(name, part)][0]}: tensor {_full(name, part)}: expected the "
                f"published values of {stored.format.name}, got others: entry {at} is "
                f"{got[at]:g}, not {table[at]:g}. Tables of one's own are not covered."
            )
    part = "absmax" if stored.offset is None else "nested_absmax"
    if bad := int(np.sum(~np.isfinite(parts[part]))):
        raise ValueError(
            f"{home[_full(name, part)][0]}: tensor {_full(name, part)}: expected finite scales, "
            f"got {bad} that are NaN or infinite. {_AGAIN}"
        )


def _stored(home: Home, weight: str, parts: set[str], slot: Slot) -> Stored:
    """Checks one weight, whose tensors are `parts` and, if it is there, the weight itself."""
    states = [part for part in parts if part.startswith(_STATE)]
    file, _ = home[weight] if weight in home else home[_full(weight, min(parts))]
    if weight not in home or len(states) != 1 or states[0].removeprefix(_STATE) not in CODES:
        raise ValueError(
            f"{file}: tensor {weight}: expected a 4-bit weight with one description, "
            f"{_STATE}nf4 or {_STATE}fp4, got {', '.join(sorted(parts)) or 'nothing'} "
            f"{'with' if weight in home else 'without'} the weight itself. {_AGAIN}"
        )
    stored = _parse(home, weight, states[0], slot)
    sizes = _sizes(stored)
    if {*parts, ""} != {*sizes, *states}:
        missing = [_full(weight, part) for part in sizes if part not in {*parts, ""}]
        raise ValueError(
            f"{file}: tensor {weight}: expected the parts {', '.join([*sizes][1:])} of a weight in "
            f"{stored.format}, got {', '.join(sorted(parts - set(states)))}; missing: "
            f"{', '.join(missing) or 'none'}. {_AGAIN}"
        )
    for part, size in sizes.items():
        got = _header(home, _full(weight, part))
        if got != size:
            raise ValueError(
                f"{home[_full(weight, part)][0]}: tensor {_full(weight, part)}: expected "
                f"{_say(size)} for a weight of shape {list(stored.shape)} in {stored.format}, got "
                f"{_say(got)}. {_AGAIN}"
            )
    return stored


def _sizes(stored: Stored) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of each part but the state; the weight itself is the part ""."""
    count = math.prod(stored.shape)
    blocks = count // stored.format.block_size
    nested = stored.format.double_quant
    sizes: dict[str, tuple[str, tuple[int, ...]]] = {
        "": ("U8", (count // 2, 1)),
        "absmax": ("U8" if nested else "F32", (blocks,)),
        "quant_map": ("F32", (len(CODES[stored.format.name]),)),
    }
    if nested:
        sizes["nested_absmax"] = ("F32", (-(-blocks // NESTED_BLOCK),))
        sizes["nested_quant_map"] = ("F32", (len(dynamic_map()),))
    return sizes


def _parse(home: Home, weight: str, part: str, slot: Slot) -> Stored:
    """Reads a weight's description."""
    where = f"{home[weight][0]}: tensor {weight}"
    state = _state(home, f"{weight}.{part}")
    nested = "nested_offset" in state
    wanted: dict[str, tuple[Any, ...]] = {
        "quant_type": (part.removeprefix(_STATE),),
        "dtype": DTYPES,
        "shape": (list(slot.shape),),
        "nested_blocksize": (NESTED_BLOCK,) if nested else (None,),
        "nested_dtype": ("float32",) if nested else (None,),
    }
    for field, values in wanted.items():
        if state.get(field) not in values:
            raise ValueError(
                f"{where}: {part}: {field}: expected {' or '.join(map(repr, values))}, got "
                f"{state.get(field)!r}. Check that config and weights belong to the same model."
            )
    try:
        format = Format(state["quant_type"], state["blocksize"], nested)
        offset = float(state["nested_offset"]) if nested else None
        if offset is not None and not abs(offset) <= np.finfo(np.float32).max:
            raise ValueError(f"nested_offset: expected a finite number, got {offset}")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{where}: {part}: {error!r}. {_AGAIN}") from error
    out, size = slot.shape
    if size % format.block_size:
        raise ValueError(
            f"{where}: expected rows of whole blocks, got {size} inputs in blocks of "
            f"{format.block_size}: blocks span two rows, which is not covered. Load the original "
            "weights with quantize=Format(), which pads each row."
        )
    return Stored(format, (out, size), state["dtype"], offset)


def _state(home: Home, name: str) -> dict[str, Any]:
    """The JSON in a tensor."""
    file, reader = home[name]
    got = _header(home, name)
    if got[0] != "U8" or math.prod(got[1]) > _LONGEST_STATE:
        raise ValueError(
            f"{file}: tensor {name}: expected at most {_LONGEST_STATE} bytes (U8) of JSON, got "
            f"{_say(got)}. {_AGAIN}"
        )
    try:
        state = json.loads(reader.get_tensor(name).tobytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: tensor {name}: expected JSON, got {error}. {_AGAIN}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{file}: tensor {name}: expected a JSON object, got {state!r}. {_AGAIN}")
    return state


def _header(home: Home, name: str) -> tuple[str, tuple[int, ...]]:
    header = home[name][1].get_slice(name)
    return header.get_dtype(), tuple(header.get_shape())


def _say(size: tuple[str, tuple[int, ...]]) -> str:
    return f"{size[0]} {list(size[1])}"
