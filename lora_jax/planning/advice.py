"""What to change where a plan does not fit, found by planning that."""

from __future__ import annotations

import math
from typing import Any

from lora_jax.models.partition import row_parts
from lora_jax.planning.plan import Plan, gib, plan
from lora_jax.training.mesh import spell_mesh

MOST_CHIPS = 1024


def advice(arguments: dict[str, Any], made: Plan, room: int) -> list[str]:
    """Single changes that make a plan fit, by arithmetic, the least first.

    Args:
      arguments: of `plan`, the model among them.
      made: what it returned.
      room: bytes of memory of each chip.

    Returns:
      A sentence for each: fewer rows, another method, more chips to split the weights over.

    Example:
      >>> arguments = {"model": "llama-3.1-8b", "method": "lora", "batch_size": 1}
      >>> for change in advice(arguments, plan(**arguments), 16 * 2**30):
      ...     print(change)
      --method qlora takes ... GiB.
      --mesh fsdp=2 --batch-size 2, 2 chips, takes ... GiB on each.
    """
    arguments = {**arguments, "topology": None}

    def takes(**changed: Any) -> int:
        return plan(**{**arguments, **changed}).memory.total

    found = []
    parts = row_parts(made.mesh)
    rows = made.batch_size // parts
    while rows > 1:
        rows //= 2
        if (needed := takes(batch_size=rows * parts)) <= room:
            found.append(f"--batch-size {rows * parts} takes {gib(needed)}.")
            break
    for method in {"full": ("lora", "qlora"), "lora": ("qlora",), "qlora": ()}[made.method]:
        try:
            needed = takes(method=method)
        except ValueError:  # A model that cannot be quantized.
            continue
        if needed <= room:
            found.append(f"--method {method} takes {gib(needed)}.")
            break
    mesh, batch_size = dict(made.mesh), made.batch_size
    if mesh == {"data": 1}:
        mesh = {"fsdp": 1}
    while 2 * math.prod(mesh.values()) <= MOST_CHIPS:
        mesh["fsdp"] = 2 * mesh.get("fsdp", 1)
        batch_size *= 2
        try:
            needed = takes(mesh=mesh, batch_size=batch_size)
        except ValueError:  # An axis of a weight that cannot be split so far.
            break
        if needed <= room:
            found.append(
                f"--mesh {spell_mesh(mesh)} --batch-size {batch_size}, "
                f"{math.prod(mesh.values())} chips, takes {gib(needed)} on each."
            )
            break
    return found
