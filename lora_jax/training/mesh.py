"""The mesh of devices that a run is spread over, from what the command line says."""

from __future__ import annotations

import math

import jax
from jax.sharding import AxisType, Mesh

from lora_jax.sharding import AXES


def parse_mesh(text: str) -> dict[str, int]:
    """Names and sizes of the mesh's axes.

    Args:
        text: Such as `data=2,fsdp=4`; names are those of `lora_jax.sharding.AXES`.

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
        if name not in AXES or name in sizes or not size.isdecimal() or int(size) < 1:
            raise ValueError(
                f"mesh: expected axes of {', '.join(AXES)}, each once and with a size of at least "
                f"1, such as data=2,fsdp=4; got {part.strip()!r} in {text!r}."
            )
        sizes[name] = int(size)
    return sizes


def make_mesh(sizes: dict[str, int]) -> Mesh:
    """All devices of all processes as a mesh.

    Args:
        sizes: Name -> size, as from `parse_mesh`.

    Raises:
        ValueError: The sizes do not multiply to the number of devices.
    """
    wanted, found = math.prod(sizes.values()), jax.device_count()
    if wanted != found:
        spelled = ",".join(f"{name}={size}" for name, size in sizes.items())
        raise ValueError(
            f"mesh: {spelled} is for {wanted} devices, expected one for all {found} "
            f"({jax.process_count()} hosts with {jax.local_device_count()} each). Change a size."
        )
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes)
    )
