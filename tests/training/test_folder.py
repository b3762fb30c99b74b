"""A run's folder: nothing is lost, nothing is half written, nothing foreign is touched."""

import dataclasses
import errno
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import lora_jax as lora
from lora_jax.training import folder as folder_module
from lora_jax.training.folder import DiskFull, FolderError, RunFolder
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
    folder.save(state, CONFIG, PARAMS, place=PLACE)
    again, place = folder.restore(state_at(0, dtype=dtype))
    assert_same(again, state)
    assert place == PLACE
    adapter, config = lora.restore(folder.adapter, PARAMS)
    assert_same(adapter, state.adapter)
    assert config == CONFIG


def test_state_in_host_memory_comes_back_there(folder):
    tx = lora.offload(TX)
    state = state_at(3, tx=tx)
    folder.save(state, CONFIG, PARAMS, place=PLACE)
    again, _ = folder.restore(state_at(0, tx=tx))
    assert_same(again, state)
    placed = lambda state: jax.tree.map(lambda leaf: leaf.sharding, state)  # noqa: E731
    assert placed(again) == placed(state)
    kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(again.opt_state[0].mu)}
    assert kinds == {"pinned_host"}
    # What was saved with the state in one memory goes on with it in the other.
    assert_same(folder.restore(state_at(0))[0], state)


def test_a_sharded_state_comes_back_sharded(folder):
    rows = NamedSharding(jax.make_mesh((4,), ("x",)), PartitionSpec("x"))
    shard = lambda leaf: jax.device_put(leaf, rows) if leaf.shape[:1] == (8,) else leaf  # noqa: E731
    folder.save(state_at(3), CONFIG, PARAMS, place=PLACE)
    again, _ = folder.restore(jax.tree.map(shard, state_at(0)))
    assert_same(again, state_at(3))
    assert again.opt_state[0].nu["w"].lora_a.sharding == rows
    assert not again.step.committed


def test_a_save_replaces_the_one_before(folder):
    for step in (3, 5):
        folder.save(state_at(step), CONFIG, PARAMS, place=PLACE)
    assert int(folder.restore(state_at(0))[0].step) == 5
    assert_same(lora.restore(folder.adapter, PARAMS)[0], state_at(5).adapter)
    names = sorted(path.name for path in folder.path.iterdir())
    assert names == ["adapter", "run.json", "state.safetensors"]


def fail_with(error):
    def write(*args, **kwargs):
        raise error

    return write


# As the operating system says it, and as libraries that write for Orbax do.
FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    ValueError(
        "RESOURCE_EXHAUSTED: Failed to write: [OS error 28: ENOSPC No space left on device]"
    ),
]


@pytest.mark.parametrize("error", FULL)
@pytest.mark.parametrize("where", ["state", "adapter"])
def test_a_full_disk_leaves_the_last_good_adapter(folder, monkeypatch, error, where):
    folder.save(state_at(3), CONFIG, PARAMS, place=PLACE)
    with monkeypatch.context() as patch:
        if where == "state":
            patch.setattr(folder_module.safetensors.numpy, "save_file", fail_with(error))
        else:
            patch.setattr(folder_module.checkpoint, "save", fail_with(error))
        with pytest.raises(DiskFull) as caught:
            folder.save(state_at(5), CONFIG, PARAMS, place=PLACE)
    message = str(caught.value)
    assert "step 5 was not saved" in message
    assert f"the adapter saved before is whole, in {folder.adapter}" in message
    assert_same(lora.restore(folder.adapter, PARAMS)[0], state_at(3).adapter)
    names = sorted(path.name for path in folder.path.iterdir())
    assert names == ["adapter", "run.json", "state.safetensors"]
    folder.save(state_at(5), CONFIG, PARAMS, place=PLACE)
    assert int(folder.restore(state_at(0))[0].step) == 5


def test_a_full_disk_before_any_save_says_so(folder, monkeypatch):
    monkeypatch.setattr(folder_module.checkpoint, "save", fail_with(FULL[0]))
    with pytest.raises(DiskFull, match="no adapter has been saved yet"):
        folder.save(state_at(5), CONFIG, PARAMS, place=PLACE)


def test_other_errors_are_not_called_a_full_disk(folder, monkeypatch):
    monkeypatch.setattr(folder_module.checkpoint, "save", fail_with(ValueError("something else")))
    with pytest.raises(ValueError, match="something else"):
        folder.save(state_at(5), CONFIG, PARAMS, place=PLACE)


def test_a_folder_with_a_run_is_refused(folder):
    with pytest.raises(FolderError, match=r"already holds a run\. Go on with it \(--resume\)"):
        folder.check_new(overwrite=False)
    folder.check_new(overwrite=True)


def test_a_folder_with_other_files_is_refused_even_to_overwrite(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(FolderError, match=r"holds thesis\.tex"):
            RunFolder(tmp_path).check_new(overwrite=overwrite)
    with pytest.raises(FolderError, match="expected a folder, got a file"):
        RunFolder(tmp_path / "thesis.tex").check_new(overwrite=False)
    RunFolder(tmp_path / "new").check_new(overwrite=False)


def test_overwriting_removes_the_run_and_nothing_else(folder):
    folder.save(state_at(3), CONFIG, PARAMS, place=PLACE)
    folder.log({"kind": "train", "step": 1})
    (folder.path / "notes.txt").write_text("mine")
    folder.begin({"options": {"new": True}})
    assert sorted(path.name for path in folder.path.iterdir()) == ["notes.txt", "run.json"]
    assert folder.about() == {"options": {"new": True}}


def test_entries_after_the_save_are_forgotten(folder):
    for step in range(1, 6):
        folder.log({"kind": "train", "step": step, "loss": float("nan") if step == 2 else 1.0})
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # the power went off
    folder.forget_after(3)
    assert [entry["step"] for entry in folder.metrics()] == [1, 2, 3]
    lines = (folder.path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[1], parse_constant=pytest.fail)["loss"] == "nan"


def test_a_damaged_state_is_an_error(folder):
    with pytest.raises(FolderError, match="stopped before its first save"):
        folder.restore(state_at(0))
    folder.save(state_at(3), CONFIG, PARAMS, place=PLACE)
    file = folder.path / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(FolderError, match="damaged or truncated"):
        folder.restore(state_at(0))


def test_a_state_of_another_adapter_is_an_error(folder):
    folder.save(state_at(3), CONFIG, PARAMS, place=PLACE)
    with pytest.raises(FolderError, match=r"lora_a.*expected bfloat16\[8, 2\], got float32"):
        folder.restore(state_at(0, dtype="bfloat16"))
    other = init_state({"other": jnp.ones(2)}, optax.sgd(1.0), jax.random.key(0))
    with pytest.raises(FolderError, match="does not fit the run's options"):
        folder.restore(other)


def test_a_damaged_description_is_an_error(folder):
    (folder.path / "run.json").write_text('{"options": ')
    with pytest.raises(FolderError, match=r"run\.json: damaged"):
        folder.about()
    with pytest.raises(FolderError, match="holds no run to go on with"):
        RunFolder(folder.path / "elsewhere").about()
