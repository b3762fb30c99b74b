"""How long saving a training run holds up its steps.

Timed, on a CPU: SmolLM2-135M (fetched from PyPI once, 90 MB), an adapter of rank 8 on all linear
layers and its AdamW state, the training step of this library. A round is some steps, a save in the
background, the step during which its files are written, and a save that is waited for. `blocked` is
how long the call of `save` takes with the step before it finished: how long a device stands idle.
Both kinds of save are divided by the median of the round's own steps, so that a machine that slows
down slows both. Run with `python benchmarks/saving.py`; it takes a few minutes.
"""

from __future__ import annotations

import functools
import os
import statistics
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lora_jax as lora
from lora_jax.interop.pretrained import SMOLLM2, load_pretrained
from lora_jax.models import decoder
from lora_jax.training.batching import Batch
from lora_jax.training.objective import next_token_loss
from lora_jax.training.step import TrainState, init_state, make_step

RANK, LENGTH, ROUNDS, STEPS = 8, 256, 7, 4
THREADS = len(os.sched_getaffinity(0))


def batch(vocab_size: int) -> Batch:
    """One row of tokens, each learning its next."""
    tokens = np.random.default_rng(0).integers(0, vocab_size, (1, LENGTH + 1)).astype(np.int32)
    positions = np.arange(LENGTH, dtype=np.int32)[None]
    ones = np.ones((1, LENGTH), np.int32)
    return Batch(
        tokens=tokens[:, :-1],
        positions=positions,
        segment_ids=ones,
        select=positions,
        select_targets=tokens[:, 1:],
        select_weights=ones.astype(np.float32),
        select_examples=0 * ones,
    )


def main() -> None:
    """Prints the table."""
    jax.config.update("jax_platforms", "cpu")
    model = load_pretrained(SMOLLM2, scan_layers=True)
    apply = functools.partial(decoder.apply, model.config)
    config = lora.LoraConfig(rank=RANK, alpha=2 * RANK, targets="all-linear")
    example = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    adapter = lora.init(jax.random.key(0), config, apply, model.params, example)
    tx = optax.adamw(1e-4)
    state = init_state(adapter, tx, jax.random.key(1))
    advance = jax.jit(make_step(next_token_loss(lora.lift(apply)), tx), donate_argnums=0)
    rows = batch(model.config.vocab_size)

    def step(state: TrainState) -> tuple[TrainState, float]:
        start = time.perf_counter()
        state, metrics = advance(state, model.params, rows)
        jax.block_until_ready((state, metrics))
        return state, time.perf_counter() - start

    def save(number: int, state: TrainState, *, alone: bool = False, wait: bool = False) -> float:
        start = time.perf_counter()
        rest = {"opt_state": state.opt_state, "step": state.step, "key": state.key}
        checkpoints.save(number, state.adapter, None if alone else rest)
        if wait:
            checkpoints.wait()
        return time.perf_counter() - start

    sizes = [
        sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) / 1e6
        for tree in (state.adapter, (state.adapter, state.opt_state))
    ]
    print(f"SmolLM2-135M, {LENGTH} tokens a step, rank {RANK} on all linear layers, AdamW: the "
          f"adapter {sizes[0]:.1f} MB, with the optimizer's state {sizes[1]:.1f} MB; CPU, "
          f"{THREADS} threads, {ROUNDS} rounds")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "checkpoints"
        with lora.Checkpoints(directory, config, model.params) as checkpoints:
            state, _ = step(state)
            for number in (1, 2):  # Compiles the checksums, once a run.
                save(number, state, alone=number == 1, wait=True)
            results = []
            for number in range(1, ROUNDS + 1):
                times = []
                for _ in range(STEPS):
                    state, seconds = step(state)
                    times.append(seconds)
                adapter_alone = save(10 * number, state, alone=True)
                state, _ = step(state)
                checkpoints.wait()
                with_state = save(10 * number + 1, state)
                state, _ = step(state)
                checkpoints.wait()
                waited = save(10 * number + 2, state, wait=True)
                median = statistics.median(times)
                results.append((median, *(t / median for t in (adapter_alone, with_state, waited))))
    names = (
        "s a step",
        "blocked by the adapter alone / step",
        "blocked by all that is saved / step",
        "the same, waited for / step",
    )
    print(f"{'':36}{'median':>9}{'least':>9}{'most':>9}")
    for name, values in zip(names, zip(*results, strict=True), strict=True):
        print(f"{name:36}{statistics.median(values):9.4f}{min(values):9.4f}{max(values):9.4f}")


if __name__ == "__main__":
    main()
