"""Checkpoints of arrays that are split over several processes, none of which has all of one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lora_jax as lora
from lora_jax.checkpoint import fingerprint

PROGRAM = """
import pathlib, sys
import jax

jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, int(sys.argv[2]))
from tests.core.test_checkpoint_processes import run_in_each

run_in_each(pathlib.Path(sys.argv[3]))
"""
CONFIG = lora.LoraConfig(rank=2, targets="w")
TX = optax.adam(1e-2)


def base():
    values = {"w": np.random.default_rng(0).normal(size=(8, 8)), "b": np.ones(8)}
    return jax.tree.map(lambda x: x.astype(np.float32), values)


def start():
    fn = lambda params, x: x @ params["w"]  # noqa: E731
    adapter = lora.init(jax.random.key(0), CONFIG, fn, base(), jnp.ones((1, 8)))
    return jax.tree.map(lambda leaf: leaf + 1, adapter)


def advance(adapter, opt_state):
    updates, opt_state = TX.update(adapter, opt_state, adapter)
    return optax.apply_updates(adapter, updates), opt_state


def parts(tree):
    return jax.tree.map(lambda x: np.asarray(x.addressable_shards[0].data), tree)


def run_in_each(directory):
    """What each of two processes with two devices does."""
    kinds = (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit)
    for kind in kinds:
        run_on(
            jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(kind,) * 2), directory / kind.name
        )


def run_on(mesh, directory):
    spec = jax.sharding.PartitionSpec
    placed = lora.params_shardings(base(), mesh, {"w": spec("fsdp", "tensor"), "*": spec()})
    params = jax.device_put(base(), placed)
    assert fingerprint(params) == fingerprint(base())
    places = lora.adapter_shardings(placed, start())
    adapter = jax.device_put(start(), places)
    assert not adapter["w"].lora_a.is_fully_addressable
    state = jax.jit(TX.init, out_shardings=lora.optimizer_shardings(TX, adapter, places))(adapter)
    step = jax.jit(advance, donate_argnums=(0, 1))
    with lora.Checkpoints(directory / "run", CONFIG, params, keep=1) as checkpoints:
        for number in (1, 2, 3):
            adapter, state = step(adapter, state)
            checkpoints.save(number, adapter, {"opt_state": state, "key": jax.random.key(5)})
        wanted = parts((adapter, state))
        like = jax.tree.map(jnp.zeros_like, (adapter, state))
        number, adapter, rest, _ = checkpoints.restore(
            (like[0], {"opt_state": like[1], "key": jax.random.key(0)})
        )
    assert number == 3
    jax.tree.map(np.testing.assert_array_equal, parts((adapter, rest["opt_state"])), wanted)
    for overwrite in (False, True):
        lora.save(directory / "alone", adapter, CONFIG, params, overwrite=overwrite)
    for folder in ("alone", "run/3"):
        again, _ = lora.restore(directory / folder, params)
        jax.tree.map(np.testing.assert_array_equal, parts(again), wanted[0])
        assert jax.tree.map(lambda x: x.sharding, again) == places


def test_saved_by_two_processes_it_is_restored_by_both_and_by_one(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, port, str(rank), str(tmp_path)],
            env=environment,
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=180)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], said
    adapter = start()
    state = TX.init(adapter)
    for _ in range(3):
        adapter, state = jax.jit(advance)(adapter, state)
    for kind in ("Auto", "Explicit"):
        assert [path.name for path in (tmp_path / kind / "run").iterdir()] == ["3"]
        for folder in ("alone", "run/3"):
            restored, _ = lora.restore(tmp_path / kind / folder, base())
            jax.tree.map(np.testing.assert_array_equal, restored, adapter)
