"""How long a step takes to trace and compile, lifted and written by hand, in one run.

CPU time, all threads; the two take turns, so that a machine that slows down slows both. Run with
`python benchmarks/compile_time.py`.
"""

from __future__ import annotations

import statistics
import time
from functools import partial
from typing import Any

import jax
from programs import transformer, transformer_arguments, transformer_by_hand

import lora_jax as lora

LAYERS, WIDTH, ROUNDS = 30, 256, 5


def seconds(function: Any, *args: Any) -> tuple[float, float]:
    """CPU seconds to trace and lower, and to compile, with no cache warm."""
    jax.clear_caches()
    start = time.process_time()
    lowered = jax.jit(jax.value_and_grad(function)).lower(*args)
    middle = time.process_time()
    lowered.compile()
    return middle - start, time.process_time() - middle


def main() -> None:
    """Prints the table."""
    print(f"{LAYERS}-layer decoder, width {WIDTH}, value_and_grad; median of {ROUNDS} rounds")
    print(f"{'layers':10} {'program':8} {'trace s':>8} {'compile s':>10} {'ratio of the sum':>17}")
    for scan in (False, True):
        params, adapter, by_hand, x = transformer_arguments(LAYERS, WIDTH, scan=scan)
        lifted = lora.lift(partial(transformer, scan=scan))

        def loss_lifted(adapter: Any, params: Any, x: Any, lifted: Any = lifted) -> Any:
            return (lifted(lora.combine(params, adapter), x) ** 2).mean()

        def loss_by_hand(adapter: Any, params: Any, x: Any, scan: bool = scan) -> Any:
            return (transformer_by_hand(params, adapter, x, scan=scan) ** 2).mean()

        seconds(loss_by_hand, by_hand, params, x)
        times: dict[str, list[tuple[float, float]]] = {"by hand": [], "lifted": []}
        for _ in range(ROUNDS):
            times["by hand"].append(seconds(loss_by_hand, by_hand, params, x))
            times["lifted"].append(seconds(loss_lifted, adapter, params, x))
        ratio = statistics.median(
            sum(a) / sum(b) for a, b in zip(times["lifted"], times["by hand"], strict=True)
        )
        for name, pairs in times.items():
            trace, compile_ = (statistics.median(pair[i] for pair in pairs) for i in (0, 1))
            shown = f"{ratio:17.3f}" if name == "lifted" else ""
            kind = "scanned" if scan else "unrolled"
            print(f"{kind:10} {name:8} {trace:8.2f} {compile_:10.2f} {shown}")


if __name__ == "__main__":
    main()
