"""What quantized weights take: stored bits, rounding errors, and the memory of a training step.

Three tables: bits for each parameter and errors of one weight, from its arrays; the memory of a
compiled training step on a CPU; and on one chip of a TPU v5e, compiled for ahead of time, which
needs libtpu (`pip install 'lora_jax[tpu-aot]'`) but no TPU. Deterministic: no clock is read. Run
with `python benchmarks/quantization_memory.py`; it takes half a minute, with libtpu two minutes.

To be read with care: a CPU multiplies bfloat16 in float32, and XLA keeps all dense kernels in
float32 for that, which a 4-bit base spares it; where layers are unrolled, its CPU backend shares
formed weights between forward and backward pass and so keeps them, as it does with anything under
`jax.checkpoint`. On a TPU, temporaries are those in main memory, not those in vector memory.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from programs import (
    BATCH,
    LAYERS,
    QUANTIZED_WIDTH,
    RANK,
    WITHOUT_LIBTPU,
    base_argument_bytes,
    frozen_stack,
    frozen_step,
    tpu_v5e,
)

from lora_jax.adapters.lora import Axes
from lora_jax.quantization.formats import Format
from lora_jax.quantization.quantized import Quantized, quantize_array

FORMATS = (Format(), Format(double_quant=False), Format("fp4"), Format("int8"))
WEIGHT = (4096, 4096)


def stored_bits(quantized: Quantized) -> float:
    """Bits of all of its arrays for each parameter."""
    return 8 * sum(array.nbytes for array in jax.tree.leaves(quantized)) / quantized.size


def relative_error(weight: jax.Array, quantized: Quantized) -> float:
    """The Frobenius norm of what rounding loses, over the weight's."""
    return float(jnp.linalg.norm(weight - quantized.form("float32")) / jnp.linalg.norm(weight))


def print_formats() -> None:
    """Bits and errors of one Gaussian weight."""
    weight = jax.random.normal(jax.random.key(0), WEIGHT)
    print(f"a Gaussian weight, {WEIGHT[0]} x {WEIGHT[1]}")
    print(f"{'format':32} {'bits a parameter':>16} {'relative error':>15}")
    for format in FORMATS:
        quantized = quantize_array(weight, Axes((), (0,), (1,)), format)
        error = relative_error(weight, quantized)
        print(f"{format!s:32} {stored_bits(quantized):16.4f} {error:15.4f}")


def print_steps(where: str, dtypes: tuple[str, ...], sharding: Any = None) -> None:
    """Temporaries and base of the steps, on a dense base and on a 4-bit one."""
    print()
    print(
        f"value_and_grad by the adapter, {LAYERS} dense layers of {QUANTIZED_WIDTH}, rank {RANK}, "
        f"batch {BATCH}; {where}; MB"
    )
    print(
        f"{'model':9} {'layers':9} {'base':6} {'base arguments':>15} {'/ bfloat16':>11} "
        f"{'temporaries':>12} {'- dense base':>13} {'one layer':>10}"
    )
    in_bfloat16 = LAYERS * QUANTIZED_WIDTH**2 * 2
    for dtype in dtypes:
        one_layer = QUANTIZED_WIDTH**2 * jnp.dtype(dtype).itemsize
        for scan in (True, False):
            stack = frozen_stack(dtype, scan=scan)
            dense = None
            for kind in stack.kernels:
                step = frozen_step(stack, kind, sharding)
                base = base_argument_bytes(stack, step)
                temporaries = step.memory_analysis().temp_size_in_bytes
                dense = temporaries if dense is None else dense
                print(
                    f"{dtype:9} {'scanned' if scan else 'unrolled':9} {kind:6} "
                    f"{base / 1e6:15.3f} {base / in_bfloat16:11.4f} {temporaries / 1e6:12.3f} "
                    f"{(temporaries - dense) / 1e6:13.3f} {one_layer / 1e6:10.3f}"
                )


def main() -> None:
    """Prints the tables."""
    # Where a TPU's library is installed, JAX would look for a TPU first.
    jax.config.update("jax_platforms", "cpu")
    print_formats()
    print_steps("CPU", ("bfloat16", "float32"))
    chip = tpu_v5e()
    if chip is None:
        print(f"\n{WITHOUT_LIBTPU}")
    else:
        print_steps("TPU v5e", ("bfloat16",), chip)


if __name__ == "__main__":
    main()
