"""Weak scaling in the compiled program: what each chip computes and sends, from 8 to 1,024 chips.

LoRA of rank 16 on all linear layers of Llama-3.1 8B, one row of 2048 tokens on each chip, the base
split over groups of up to 64 chips (`fsdp`), side by side (`data`), compiled for TPU v5p without
one. Scaling is good where neither grows with the number of chips. Where one group is all of 64 or
more chips, XLA gathers kernels by summing padded ones, which is twice the bytes. Deterministic: no
clock is read. Needs `pip install 'lora_jax[cli,tpu-aot]'`. Run with
`python benchmarks/weak_scaling.py [FIGURE]`; each line takes some minutes of a core. FIGURE is
written as .png and .svg.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import matplotlib.pyplot as plt
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

import lora_jax as lora
from lora_jax.planning.chips import parse_topology
from lora_jax.planning.program import KINDS

MESHES = {
    "v5p:2x2x2": {"fsdp": 8},
    "v5p:4x4x4": {"data": 4, "fsdp": 16},
    "v5p:4x8x8": {"data": 4, "fsdp": 64},
    "v5p:8x8x16": {"data": 16, "fsdp": 64},
}
CONFIG = lora.LoraConfig(rank=16, alpha=32, exclude=("lm_head/*",))


def figure(rows: list[tuple[int, float, float]]) -> plt.Figure:
    """Two panels over the number of chips: TFLOPs, and GB sent."""
    chips = [row[0] for row in rows]
    made, axes = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    for axis, column, label in zip(
        axes, (1, 2), ("TFLOPs a chip and step", "GB sent by a chip in a step"), strict=True
    ):
        values = [row[column] for row in rows]
        axis.plot(chips, values, marker="o")
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_locator(FixedLocator(chips))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(FixedFormatter([f"{count:,}" for count in chips]))
        axis.set_ylim(0, 1.3 * max(values))
        axis.set_xlabel("TPU v5p chips")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    made.suptitle("LoRA on Llama-3.1 8B, one row of 2048 tokens a chip, as compiled", fontsize=10)
    return made


def main() -> None:
    """Prints the table, row by row, and draws it."""
    jax.config.update("jax_platforms", "cpu")
    kinds = " | ".join(f"{kind}, GB" for kind in KINDS)
    print(f"| chips | TFLOPs a chip | GB sent a chip | {kinds} |")
    print("|---|---|---|" + "---|" * len(KINDS))
    rows = []
    for topology, mesh in MESHES.items():
        chips = parse_topology(topology).chips
        plan = lora.plan("llama-3.1-8b", CONFIG, mesh=mesh, batch_size=chips, topology=topology)
        sent = {kind: each.nbytes / 1e9 for kind, each in plan.compiled.collectives.items()}
        rows.append((chips, plan.compiled.flops / 1e12, sum(sent.values())))
        parts = " | ".join(f"{sent.get(kind, 0):.2f}" for kind in KINDS)
        print(f"| {chips:,} | {rows[-1][1]:.1f} | {rows[-1][2]:.2f} | {parts} |", flush=True)
    if sys.argv[1:]:
        made = figure(rows)
        for suffix in (".png", ".svg"):
            made.savefig(Path(sys.argv[1]).with_suffix(suffix), dpi=150)


if __name__ == "__main__":
    main()
