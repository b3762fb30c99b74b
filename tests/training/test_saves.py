"""What a run saves: all of its state, in the background, and an adapter to take away."""

import dataclasses
import errno
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import lora_jax as lora
from lora_jax.checkpoint import UnreadableError
from lora_jax.training.evaluation import Evaluation
from lora_jax.training.folder import DiskFull, RunFolder
from lora_jax.training.saves import Saves
from lora_jax.training.step import init_state

CONFIG = lora.LoraConfig(rank=2, targets=("w",))
PARAMS = {"w": jnp.arange(64.0).reshape(8, 8)}
TX = optax.adam(1e-3)
PLACE = {"batches": {"next": 3}, "examples": "abc"}


def state_at(step, *, dtype=None, tx=TX):
    config = dataclasses.replace(CONFIG, dtype=dtype)
    adapter = lora.init(
        jax.random.key(step), config, lambda p, x: x @ p["w"], PARAMS, jnp.ones((1, 8))
    )
    state = init_state(adapter, tx, jax.random.key(9))
    return dataclasses.replace(state, step=jnp.asarray(step, jnp.int32))


@pytest.fixture
def folder(tmp_path):
    made = RunFolder(tmp_path / "run")
    made.begin({"options": {}})
    return made


def opened(folder, keep=2):
    return Saves(folder, CONFIG, PARAMS, keep=keep)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def assert_same(one, two):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        a, b = (
            jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
            for x in (a, b)
        )
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_what_is_saved_comes_back_bit_for_bit(folder, dtype):
    state = state_at(3, dtype=dtype)
    with opened(folder) as saves:
        saves.save(3, state, place=PLACE)
    with opened(folder) as saves:
        step, again, place = saves.restore(state_at(0, dtype=dtype))
    assert_same(again, state)
    assert (step, place) == (3, PLACE)
    adapter, config = lora.restore(folder.adapter, PARAMS)
    assert_same(adapter, state.adapter)
    assert config == CONFIG
    assert names(folder.path) == ["adapter", "checkpoints", "run.json"]


def test_state_in_host_memory_comes_back_there(folder):
    tx = lora.offload(TX)
    state = state_at(3, tx=tx)
    with opened(folder) as saves:
        saves.save(3, state, place=PLACE)
        again = saves.restore(state_at(0, tx=tx))[1]
    assert_same(again, state)
    placed = lambda state: jax.tree.map(lambda leaf: leaf.sharding, state)  # noqa: E731
    assert placed(again) == placed(state)
    kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(again.opt_state[0].mu)}
    assert kinds == {"pinned_host"}


def test_a_sharded_state_comes_back_sharded(folder):
    rows = NamedSharding(jax.make_mesh((4,), ("x",)), PartitionSpec("x"))
    shard = lambda leaf: jax.device_put(leaf, rows) if leaf.shape[:1] == (8,) else leaf  # noqa: E731
    with opened(folder) as saves:
        saves.save(3, state_at(3), place=PLACE)
        again = saves.restore(jax.tree.map(shard, state_at(0)))[1]
        assert_same(again, state_at(3))
        assert again.opt_state[0].nu["w"].lora_a.sharding == rows
        assert not again.step.committed
        # And what is saved with a part of it on a mesh comes back on one device.
        saves.save(4, jax.tree.map(shard, state_at(4)), place=PLACE)
        assert_same(saves.restore(state_at(0))[1], state_at(4))


def test_the_last_ones_and_the_best_are_kept_and_the_last_is_taken_away(folder):
    with opened(folder) as saves:
        for step, loss in ((1, 0.5), (2, 0.3), (3, 0.4), (4, None), (5, None)):
            evaluation = None if loss is None else Evaluation(loss, 0.5, 3, 3)
            saves.save(step, state_at(step), place=PLACE, evaluation=evaluation)
    assert names(folder.checkpoints) == ["2", "4", "5"]
    assert_same(lora.restore(folder.adapter, PARAMS)[0], state_at(5).adapter)


def test_what_is_saved_already_is_not_saved_again(folder):
    with opened(folder) as saves:
        saves.save(3, state_at(3), place=PLACE)
        saves.save(3, state_at(4), place=PLACE)
    with opened(folder) as saves:
        saves.restore(state_at(0))
        saves.save(3, state_at(5), place=PLACE)
        assert_same(saves.restore(state_at(0))[1], state_at(3))


# As the operating system says it, and as libraries that write for Orbax do.
FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    ValueError(
        "RESOURCE_EXHAUSTED: Failed to write: [OS error 28: ENOSPC No space left on device]"
    ),
]


def fails_at(name, error):
    """A rename to this name fails; Orbax does it in the background, when all is written."""
    rename = os.rename

    def renamed(source, target, **options):
        if os.path.basename(target) == name:
            raise error
        rename(source, target, **options)

    return renamed


def save_all(folder, steps):
    with opened(folder) as saves:
        for step in steps:
            saves.save(step, state_at(step), place=PLACE)


@pytest.mark.parametrize("error", FULL)
@pytest.mark.parametrize("last", [False, True])
def test_a_full_disk_leaves_the_last_good_adapter(folder, monkeypatch, error, last):
    steps = (3, 5) if last else (3, 5, 7)
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fails_at("5", error))
        with pytest.raises(DiskFull) as caught:
            save_all(folder, steps)
    message = str(caught.value)
    assert "step 5 was not saved" in message
    assert f"what was saved before is whole, in {folder.checkpoints / '3'}" in message
    assert names(folder.checkpoints) == ["3"]
    with opened(folder) as saves:
        assert saves.restore(state_at(0))[0] == 3
        saves.save(5, state_at(5), place=PLACE)
    assert_same(lora.restore(folder.adapter, PARAMS)[0], state_at(5).adapter)


def test_a_full_disk_before_any_save_says_so(folder, monkeypatch):
    monkeypatch.setattr(os, "rename", fails_at("5", FULL[0]))
    with pytest.raises(DiskFull, match="nothing has been saved yet"), opened(folder) as saves:
        saves.save(5, state_at(5), place=PLACE)


def test_other_errors_are_not_called_a_full_disk(folder, monkeypatch):
    monkeypatch.setattr(os, "rename", fails_at("5", ValueError("something else")))
    with pytest.raises(ValueError, match="something else"), opened(folder) as saves:
        saves.save(5, state_at(5), place=PLACE)


def test_an_error_before_anything_was_saved_leaves_the_adapter_alone(folder):
    with opened(folder) as saves:
        saves.save(3, state_at(3), place=PLACE)
    about = folder.checkpoints / "3" / "about" / "metadata"
    about.write_text("{")
    with pytest.raises(UnreadableError), opened(folder) as saves:
        saves.restore(state_at(0))
    assert_same(lora.restore(folder.adapter, PARAMS)[0], state_at(3).adapter)
