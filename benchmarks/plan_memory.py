"""Peak memory of each chip of a training step: the plan's arithmetic against the TPU's compiler.

Full fine-tuning, LoRA and QLoRA (rank 16 on all linear layers but the head), rows of 2048 tokens,
all learned, each layer recomputed. The base, its gradients and the optimizer's state are split over
all chips (`fsdp`), and so are the rows. The batch is the largest power of two up to 8 rows a chip
that fits. No TPU is needed, but its compiler is: `pip install 'lora_jax[cli,tpu-aot]'`. Run with
`python benchmarks/plan_memory.py`, or with the first words of rows to compile only those, such as
`python benchmarks/plan_memory.py "llama-3.1-8b v5e:2x4"`. A row takes a minute or more of a core.
"""

from __future__ import annotations

import sys
from typing import Any

import jax

import lora_jax as lora
from lora_jax.planning.chips import GIB, HBM, parse_topology

ROWS = (
    ("llama-3.1-8b", "v5e:1x1"),
    ("llama-3.1-8b", "v5e:2x2"),
    ("llama-3.1-8b", "v5e:2x4"),
    ("llama-3.1-70b", "v5e:4x4"),
    ("llama-3.1-70b", "v5p:2x2x2"),
    ("llama-3.1-405b", "v5p:4x4x4"),
)
METHODS: Any = ("full", "lora", "qlora")
CONFIG = lora.LoraConfig(rank=16, alpha=32, exclude=("lm_head/*",))
SEQ_LEN = 2048


def largest(model: str, topology: str, method: Any) -> tuple[int, lora.Plan]:
    """Rows a chip, and the compiled plan; of one row, if nothing fits."""
    topology_ = parse_topology(topology)
    chips = topology_.chips
    mesh = {"fsdp": chips} if chips > 1 else {"data": 1}
    for rows in (8, 4, 2, 1):
        arguments: Any = {"method": method, "mesh": mesh, "batch_size": rows * chips}
        plan = lora.plan(model, CONFIG, seq_len=SEQ_LEN, **arguments)
        # What is far too large by arithmetic need not be compiled.
        if rows > 1 and plan.memory.total > 1.1 * HBM[topology_.kind]:
            continue
        plan = lora.plan(model, CONFIG, seq_len=SEQ_LEN, topology=topology, **arguments)
        if plan.compiled.fits:
            break
    return rows, plan


def main() -> None:
    """Prints the table, row by row."""
    jax.config.update("jax_platforms", "cpu")
    print(
        "| model | chips | method | rows a chip | plan, GiB | compiler, GiB | plan / compiler |\n"
        "|---|---|---|---|---|---|---|"
    )
    for model, topology in ROWS:
        for method in METHODS:
            row = f"{model} {topology} {method}"
            if sys.argv[1:] and not any(row.startswith(wanted) for wanted in sys.argv[1:]):
                continue
            rows, plan = largest(model, topology, method)
            fits = plan.compiled.fits
            print(
                f"| {model} | {topology} | {method} | {rows if fits else 'not 1'} | "
                f"{plan.memory.total / GIB:.2f} | {plan.compiled.peak / GIB:.2f} | "
                f"{plan.memory.total / plan.compiled.peak:.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
