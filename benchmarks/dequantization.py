"""How fast a 4-bit weight is formed, and how best to look up its 16 values.

On a CPU, timed: all ways take turns in every round, and each is compared with a pass over an array
of the output's size in the same round, so that a machine that slows down slows both. The ways are
those to unpack and to look up written out below, `Quantized.form` of the library, and where they
are installed (`pip install qwix==0.1.8 torch bitsandbytes==0.50.0`) those two, on as many threads.
Then, not timed but counted by XLA, the memory traffic of the same on a TPU v5e, compiled for ahead
of time, alone and inside of the product that wants the weight; that needs libtpu
(`pip install 'lora_jax[tpu-aot]'`) but no TPU. The count is of all that instructions read and
write, copies into vector memory included, so small differences mean nothing. Run with
`python benchmarks/dequantization.py`; it takes about two minutes.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from programs import WITHOUT_LIBTPU, tpu_v5e

from lora_jax.adapters.lora import Axes
from lora_jax.quantization.formats import NF4, Format, nearest
from lora_jax.quantization.quantized import quantize_array

SIZE, BLOCK, ROUNDS, ROWS = 4096, 64, 15, 512
THREADS = len(os.sched_getaffinity(0))
COPY = "pass over such an array"


def selects(index: jax.Array) -> jax.Array:
    """A tree of 15 selects, on one bit of the index after the other."""
    values: list[Any] = [np.float32(value) for value in NF4]
    for bit in range(4):
        is_set = (index & np.uint8(1 << bit)) != 0
        values = [
            jnp.where(is_set, high, low)
            for low, high in zip(values[::2], values[1::2], strict=True)
        ]
    return values[0]


def table(index: jax.Array) -> jax.Array:
    """A gather from 16 values."""
    return jnp.asarray(NF4, jnp.float32).at[index].get(mode="promise_in_bounds")


def polynomial(index: jax.Array) -> jax.Array:
    """The polynomial in the index's four bits, linear in each, that takes these values."""
    factors = np.asarray(NF4, np.float64).reshape(2, 2, 2, 2)
    for axis in range(4):
        zero, one = np.split(factors, 2, axis)
        factors = np.concatenate([zero, one - zero], axis)
    terms: list[Any] = [np.float32(factor) for factor in factors.ravel()]
    for bit in range(4):
        x = ((index >> np.uint8(bit)) & np.uint8(1)).astype(jnp.float32)
        terms = [low + x * high for low, high in zip(terms[::2], terms[1::2], strict=True)]
    return terms[0]


def neighbours(codes: jax.Array) -> jax.Array:
    """Indices `[in, out]` of codes `[in / 2, out]` with two rows that are neighbours in a byte."""
    twice = jnp.repeat(codes, 2, axis=0)
    odd = lax.broadcasted_iota(jnp.uint8, twice.shape, 0) & np.uint8(1)
    return (twice >> (np.uint8(4) * (np.uint8(1) - odd))) & np.uint8(15)


def halves(codes: jax.Array) -> jax.Array:
    """Indices `[in, out]` of codes `[in / 2, out]` with rows half a block apart in a byte."""
    half = codes.reshape(-1, 1, BLOCK // 2, codes.shape[1])
    shift = np.array([4, 0], np.uint8).reshape(1, 2, 1, 1)
    return ((half >> shift) & np.uint8(15)).reshape(-1, codes.shape[1])


def pairs(codes: jax.Array) -> jax.Array:
    """Values of `neighbours` codes, by a gather from the 256 pairs of values."""
    both = np.stack(np.meshgrid(NF4, NF4, indexing="ij"), -1).reshape(256, 2)
    looked_up = jnp.asarray(both, jnp.float32).at[codes].get(mode="promise_in_bounds")
    return jnp.moveaxis(looked_up, -1, 1).reshape(-1, codes.shape[1])


def ways(dtype: str) -> dict[str, tuple[Callable[..., Any], Any]]:
    """What to compare, by name: a function and its argument, the same weight for all."""
    weight = jax.random.normal(jax.random.key(0), (SIZE, SIZE))
    blocks = weight.reshape(-1, BLOCK, SIZE)
    scales = jnp.abs(blocks).max(1)
    index = nearest(blocks * (1 / scales)[:, None], NF4)
    rows = index.reshape(-1, 2, SIZE)
    near = (rows[:, 0] << 4) | rows[:, 1]
    apart = ((index[:, : BLOCK // 2] << 4) | index[:, BLOCK // 2 :]).reshape(-1, SIZE)

    def of(values: Callable[..., Any], codes: jax.Array) -> tuple[Callable[..., Any], Any]:
        def formed(codes: jax.Array, scales: jax.Array) -> jax.Array:
            cut = values(codes).reshape(-1, BLOCK, SIZE) * scales[:, None]
            return cut.reshape(SIZE, SIZE).astype(dtype)

        return formed, (codes, scales)

    def library(format: Format) -> tuple[Callable[..., Any], Any]:
        quantized = quantize_array(weight, Axes((), (0,), (1,)), format, compute_dtype=dtype)
        return lambda quantized: quantized.form(), (quantized,)

    found = {
        "neighbours, selects": of(lambda codes: selects(neighbours(codes)), near),
        "neighbours, table of 16": of(lambda codes: table(neighbours(codes)), near),
        "neighbours, polynomial": of(lambda codes: polynomial(neighbours(codes)), near),
        "neighbours, table of 256 pairs": of(pairs, near),
        "half a block apart, selects": of(lambda codes: selects(halves(codes)), apart),
        "half a block apart, table of 16": of(lambda codes: table(halves(codes)), apart),
        "lora_jax, float32 scales": library(Format(block_size=BLOCK, double_quant=False)),
        "lora_jax, double quantization": library(Format(block_size=BLOCK)),
    }
    if importlib.util.find_spec("qwix"):
        import qwix

        # Its scales are in the dtype of the result.
        other = qwix.quantize(
            weight.astype(dtype), "nf4", channelwise_axes=(1,), tiled_axes={0: BLOCK}
        )
        found["qwix, scales in the result's dtype"] = qwix.dequantize, (other,)
    expected = np.asarray(NF4, np.float32)[np.asarray(index)] * np.asarray(scales)[:, None]
    for name, (function, arguments) in found.items():
        # Others round to bfloat16 before, double quantization moves a scale by a fraction of it.
        loose = "qwix" in name or "double" in name
        got = np.asarray(jax.jit(function)(*arguments), np.float32)
        error = np.linalg.norm(got - expected.reshape(got.shape)) / np.linalg.norm(expected)
        limit = 0.05 if loose else 1e-6 if dtype == "float32" else 2**-8
        assert error < limit, f"{name}: other values than those of NF4: {error}"
    return found


def bitsandbytes_ways(dtype: str) -> dict[str, Callable[[], Any]]:
    """Its own, on the same weight and threads; none where it is not installed."""
    if not (importlib.util.find_spec("torch") and importlib.util.find_spec("bitsandbytes")):
        return {}
    import torch
    from bitsandbytes import functional

    torch.set_num_threads(THREADS)
    # It has no way to write in place on a CPU, but glibc can keep what is freed for the next call:
    # never mmap, never trim.
    glibc = ctypes.CDLL(None)
    kept = [glibc.mallopt(option, value) for option, value in ((-4, 0), (-1, 2**31 - 1))]
    assert all(kept), "expected glibc"
    weight = np.array(jax.random.normal(jax.random.key(0), (SIZE, SIZE))).T.copy()
    found = {}
    for nested in (False, True):
        stored = functional.quantize_4bit(
            torch.from_numpy(weight).to(getattr(torch, dtype)),
            blocksize=BLOCK,
            compress_statistics=nested,
            quant_type="nf4",
        )
        scales = "double quantization" if nested else "float32 scales"
        found[f"bitsandbytes, {scales}"] = lambda stored=stored: functional.dequantize_4bit(*stored)
    return found


def in_place(function: Callable[..., Any], arguments: Any) -> Callable[[], None]:
    """The function compiled, writing where it wrote before, as a training step does.

    Memory fresh from the system takes longer to get than to fill.
    """
    run = jax.jit(lambda out, *arguments: function(*arguments), donate_argnums=0, keep_unused=True)
    out = function(*arguments)

    def call() -> None:
        nonlocal out
        out = run(out, *arguments).block_until_ready()

    return call


def seconds(function: Callable[[], Any]) -> float:
    """Of one call."""
    time.sleep(0.01)  # Threads that spin after their work would take part in the next's.
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def print_times(dtype: str) -> None:
    """The table of one dtype."""
    calls: dict[str, Callable[[], Any]] = {}
    dense = jnp.ones((SIZE, SIZE), dtype)
    nbytes = dense.nbytes
    # A negation: XLA would leave a mere copy out.
    for name, (function, arguments) in {COPY: (jnp.negative, (dense,)), **ways(dtype)}.items():
        calls[name] = in_place(function, arguments)
    calls |= bitsandbytes_ways(dtype)
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            times[name].append(seconds(call))
    print(f"\n{SIZE} x {SIZE} to {dtype}; CPU, {THREADS} threads, median of {ROUNDS} rounds")
    print(f"{'way':38} {'ms':>8} {'best':>8} {'GB/s of output':>15} {'time / pass':>12}")
    for name, spent in times.items():
        ratio = statistics.median(a / b for a, b in zip(spent, times[COPY], strict=True))
        median = statistics.median(spent)
        print(f"{name:38} {1e3 * median:8.2f} {1e3 * min(spent):8.2f} "
              f"{nbytes / median / 1e9:15.2f} {ratio:12.2f}")  # fmt: skip


def print_traffic() -> None:
    """XLA's count for a TPU v5e."""
    chip = tpu_v5e()
    if chip is None:
        print(f"\n{WITHOUT_LIBTPU}")
        return
    x = jax.ShapeDtypeStruct((ROWS, SIZE), jnp.bfloat16)
    print(f"\n{SIZE} x {SIZE} to bfloat16, TPU v5e by XLA's count, in MB; the product is with "
          f"x [{ROWS}, {SIZE}]")  # fmt: skip
    print(f"{'':38} {'alone':>22} {'in the product':>22}")
    print(f"{'way':38} {'accessed':>10} {'temporary':>11} {'accessed':>10} {'temporary':>11}")
    dense = (jax.ShapeDtypeStruct((SIZE, SIZE), jnp.bfloat16),)
    for name, (function, arguments) in {
        "a bfloat16 weight, negated": (jnp.negative, dense), **ways("bfloat16")
    }.items():  # fmt: skip
        line = f"{name:38}"
        for program, rows in (
            (lambda x, arguments, form=function: form(*arguments), None),
            (lambda x, arguments, form=function: x @ form(*arguments), x),
        ):
            run = jax.jit(program, in_shardings=chip, out_shardings=chip)
            shapes = jax.eval_shape(lambda arguments=arguments: arguments)
            compiled: Any = run.lower(rows, shapes).compile()
            accessed = compiled.cost_analysis()["bytes accessed"]
            temporary = compiled.memory_analysis().temp_size_in_bytes
            line += f" {accessed / 1e6:10.1f} {temporary / 1e6:11.1f}"
        print(line)


def main() -> None:
    """Prints the tables."""
    # Where a TPU's library is installed, JAX would look for a TPU first.
    jax.config.update("jax_platforms", "cpu")
    for package, pip in (("qwix", "qwix==0.1.8"), ("bitsandbytes", "torch bitsandbytes==0.50.0")):
        if not importlib.util.find_spec(package):
            print(f"without {package}: pip install {pip}")
    for dtype in ("float32", "bfloat16"):
        print_times(dtype)
    print_traffic()


if __name__ == "__main__":
    main()
