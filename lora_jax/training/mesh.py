"""The mesh of devices that a run is spread over, and what lies on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lora_jax.models.partition import DECODER_AXES, row_axes, row_parts
from lora_jax.sharding import adapter_shardings, optimizer_shardings, place
from lora_jax.training.step import TrainState, init_state


def parse_mesh(text: str) -> dict[str, int]:
    """Names and sizes of the mesh's axes.

    Args:
        text: Such as `data=2,fsdp=4`; names are those of `models.partition.DECODER_AXES`.

    Returns:
        Name -> size, in the order given.

    Raises:
        ValueError: It is not of that form.

    Example:
        >>> parse_mesh("data=2,fsdp=4")
        {'data': 2, 'fsdp': 4}
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (piece.strip() for piece in part.partition("="))
        if name not in DECODER_AXES or name in sizes or not size.isdecimal() or int(size) < 1:
            raise ValueError(
                f"mesh: expected axes of {', '.join(DECODER_AXES)}, each once and with a size of "
                f"at least 1, such as data=2,fsdp=4; got {part.strip()!r} in {text!r}."
            )
        sizes[name] = int(size)
    return sizes


def spell_mesh(sizes: Mapping[str, int]) -> str:
    """The inverse of `parse_mesh`.

    Args:
        sizes: Name -> size.

    Example:
        >>> spell_mesh({"data": 2, "fsdp": 4})
        'data=2,fsdp=4'
    """
    return ",".join(f"{name}={size}" for name, size in sizes.items())


def make_mesh(sizes: dict[str, int]) -> Mesh:
    """All devices of all processes as a mesh.

    Args:
        sizes: Name -> size, as from `parse_mesh`.

    Raises:
        ValueError: The sizes do not multiply to the number of devices, or the mesh cannot be laid
            on the grid in which they are connected.
    """
    wanted, found = math.prod(sizes.values()), jax.device_count()
    spelled = spell_mesh(sizes)
    if wanted != found:
        raise ValueError(
            f"mesh: {spelled} is for {wanted} devices, expected one for all {found} "
            f"({jax.process_count()} hosts with {jax.local_device_count()} each). Change a size."
        )
    kinds = (AxisType.Auto,) * len(sizes)
    try:
        return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds)
    except NotImplementedError as error:
        raise ValueError(
            f"mesh: {spelled} cannot be laid on these {found} devices: expected each size to be a "
            "product of whole sides of the grid in which they are connected."
        ) from error


def check_rows(rows: int, mesh: Mesh) -> None:
    """Checks that every device gets as many rows as every other.

    Args:
        rows: In a batch that is computed at once.
        mesh: The devices.

    Raises:
        ValueError: They cannot be split evenly.
    """
    parts = row_parts(mesh.shape)
    if rows % parts:
        split = " x ".join(f"{name}={mesh.shape[name]}" for name in row_axes(mesh.shape))
        raise ValueError(
            f"rows: expected a multiple of {parts}, since the mesh splits the rows of a batch over "
            f"{split}; got {rows}."
        )


def spread(batch: Any, mesh: Mesh | None) -> Any:
    """A batch that every host has, its rows split over the mesh: each host uses its own alone.

    Args:
        batch: A pytree of NumPy arrays `[R, ...]`.
        mesh: The devices; `None` leaves it as it is.
    """
    if mesh is None:
        return batch
    rows = PartitionSpec(row_axes(mesh.shape))
    return jax.tree.map(lambda leaf: place(leaf, NamedSharding(mesh, rows)), batch)


def start_on_mesh(
    make_adapter: Callable[[], Any],
    params: Any,
    tx: optax.GradientTransformation,
    key: jax.Array,
    mesh: Mesh,
) -> tuple[Any, TrainState]:
    """The adapter and the state before the first step, made where they belong.

    Args:
        make_adapter: `lora_jax.init` with all but the values of `params`.
        params: The base, on the mesh.
        tx: The optimizer.
        key: PRNG key of the run.
        mesh: The devices.

    Returns:
        `(adapter, state)`; the state has a copy of the adapter's buffers.
    """
    bases = jax.tree.map(lambda leaf: leaf.sharding, params)
    places = adapter_shardings(bases, jax.eval_shape(make_adapter))
    adapter = jax.jit(make_adapter, out_shardings=places)()
    everywhere: Any = NamedSharding(mesh, PartitionSpec())
    states = TrainState(places, optimizer_shardings(tx, adapter, places), everywhere, everywhere)
    start = jax.jit(lambda adapter, key: init_state(adapter, tx, key), out_shardings=states)
    return adapter, start(adapter, key)
