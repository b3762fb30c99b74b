"""TPU chips: how much memory they have, how they are connected, and meshes of them."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
from collections.abc import Mapping
from typing import Any

from jax.experimental import mesh_utils, topologies
from jax.sharding import AxisType, Mesh

from lora_jax.training.mesh import spell_mesh

GIB = 2**30

# https://docs.cloud.google.com/tpu/docs/v4, and likewise v5e, v5p, v6e.
HBM = {"v4": 32 * GIB, "v5e": 16 * GIB, "v5p": 95 * GIB, "v6e": 32 * GIB}
"""Kind of chip -> bytes of its memory."""

# Not v4: libtpu compiles for each of its two cores apart, as no program is run there.
_DIRECTIONS = {"v5e": 2, "v5p": 3, "v6e": 2}

WITHOUT_LIBTPU = (
    "topology: compiling for a TPU needs its compiler, which runs anywhere: "
    "pip install 'lora_jax[tpu-aot]'. Without a topology, the plan is made by arithmetic alone."
)


class CompilerError(RuntimeError):
    """The TPU's compiler is not there, or refuses a program for another reason than its size."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """So many chips of one kind, connected in a grid.

    Attributes:
      kind: of the chips, a key of `HBM`.
      grid: how many of them along each direction.
    """

    kind: str
    grid: tuple[int, ...]

    @property
    def chips(self) -> int:
        """How many there are."""
        return math.prod(self.grid)

    def __str__(self) -> str:
        return f"{self.kind}:{'x'.join(map(str, self.grid))}"


def parse_topology(text: str) -> Topology:
    """Reads what a topology is called.

    Args:
      text: such as `"v5e:2x4"` or `"v5p:2x2x2"`.

    Raises:
      ValueError: it is of another form, or of a kind of chip that is not known.

    Example:
      >>> parse_topology("v5p:2x2x2").chips
      8
    """
    kind, _, grid = text.partition(":")
    sizes = grid.split("x")
    # A side of 0 would end the process inside of libtpu.
    whole = all(size.isdecimal() and int(size) > 0 for size in sizes)
    if kind not in _DIRECTIONS or len(sizes) != _DIRECTIONS[kind] or not whole:
        raise ValueError(
            f"topology: expected a kind of chip ({', '.join(_DIRECTIONS)}) and how many of them "
            "stand along each direction, two for v5e and v6e, three for v5p, such as v5e:2x4 or "
            f"v5p:2x2x2; got {text!r}."
        )
    return Topology(kind, tuple(map(int, sizes)))


def tpu_mesh(topology: Topology, sizes: Mapping[str, int]) -> Mesh:
    """A mesh of the chips of a topology, which need not be there.

    Neighbours on the mesh are neighbours on the grid, as `jax.make_mesh` would have it.

    Args:
      topology: the chips.
      sizes: name of a mesh axis -> its size.

    Raises:
      CompilerError: libtpu is not installed.
      ValueError: the sizes do not multiply to the number of chips, there is no such grid of them,
        or the mesh cannot be laid on it.
    """
    spelled = spell_mesh(sizes)
    wanted = math.prod(sizes.values())
    if wanted != topology.chips:
        raise ValueError(
            f"mesh: {spelled} is for {wanted} chips, but {topology} has {topology.chips}. "
            f"Expected sizes that multiply to {topology.chips}, such as fsdp={topology.chips}."
        )
    devices = _devices(topology)
    try:
        grid = mesh_utils.create_device_mesh(tuple(sizes.values()), devices)
    except NotImplementedError as error:
        raise ValueError(
            f"mesh: {spelled} cannot be laid on {topology}: expected each size to be a product of "
            f"whole sides of its grid, {' x '.join(map(str, topology.grid))}."
        ) from error
    return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def _devices(topology: Topology) -> list[Any]:
    if importlib.util.find_spec("libtpu") is None:
        raise CompilerError(WITHOUT_LIBTPU)
    # What a TPU machine would tell libtpu, which reads it when it is loaded, in the next call.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
    # It never touches a chip, so several processes may load it.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        return list(topologies.get_topology_desc(str(topology), "tpu").devices)
    except RuntimeError as error:
        raise ValueError(
            f"topology: libtpu knows no {topology}: {str(error).splitlines()[0]}. Expected sides "
            "that are powers of two or multiples of 4, such as v5e:2x2, v5e:4x8 or v5p:4x4x4."
        ) from error
