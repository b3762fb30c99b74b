"""A decoder's training step on meshes of eight devices: the same losses, and what moves in it."""

import collections
import dataclasses
import functools
import math
import re

import jax
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import lora_jax as lora
from lora_jax.models import decoder
from lora_jax.models.config import DecoderConfig
from lora_jax.models.partition import partition_rules
from lora_jax.training.batching import Batch
from lora_jax.training.mesh import check_rows, make_mesh, parse_mesh, spread, start_on_mesh
from lora_jax.training.objective import next_token_loss, select_logits
from lora_jax.training.step import init_state, make_step

# No two things have a size in common: rank 6, 24 tokens in a row, 20 of them learned.
ROWS, LENGTH, LEARNED, RANK, STEPS = 8, 24, 20, 6, 4
CONFIG = DecoderConfig(
    vocab_size=320,
    hidden_size=256,
    intermediate_size=512,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_dim=32,
    scan_layers=True,
)
BASE = functools.partial(decoder.apply, CONFIG)
HEAD = "lm_head/*"
# The large epsilon keeps rounding in a vanishing gradient from becoming a whole step.
TX = optax.adamw(1e-2, eps=1e-3)
STEP = make_step(next_token_loss(lora.lift(BASE)), TX, max_grad_norm=1.0)
MESHES = ("data=8", "fsdp=8", "data=2,tensor=4", "data=2,fsdp=2,tensor=2")
# 4-bit weights that are whole on every device are the one-device case.
CASES = [(mesh, quantized) for mesh in MESHES for quantized in (False, True)]
CASES.remove(("data=8", True))


def batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, CONFIG.vocab_size, (ROWS, LENGTH + 1)).astype(np.int32)
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    return Batch(
        tokens=tokens[:, :-1],
        positions=positions,
        segment_ids=np.ones_like(positions),
        select=positions[:, :LEARNED],
        select_targets=tokens[:, 1 : LEARNED + 1],
        select_weights=np.ones((ROWS, LEARNED), np.float32),
        select_examples=np.zeros((ROWS, LEARNED), np.int32),
    )


@functools.cache
def base(quantized):
    params = decoder.init_params(jax.random.key(0), CONFIG)
    if not quantized:
        return params
    tokens = np.zeros((1, 2), np.int32)
    return lora.quantize(BASE, params, tokens, exclude=HEAD, block_size=32, compute_dtype="float32")


def make_adapter():
    config = lora.LoraConfig(rank=RANK, exclude=HEAD)
    tokens = np.zeros((1, 2), np.int32)
    return lora.init(jax.random.key(1), config, BASE, decoder.abstract_params(CONFIG), tokens)


def losses_of(step, state, params, data):
    found = []
    for _ in range(STEPS):
        state, metrics = step(state, params, data)
        found.append(float(metrics.loss))
    return found, state


@functools.cache
def on_one_device(quantized):
    state = init_state(make_adapter(), TX, jax.random.key(2))
    losses, state = losses_of(jax.jit(STEP), state, base(quantized), batch())
    return losses, jax.device_get(state.adapter)


@functools.cache
def on_mesh(spelled, quantized):
    """Losses, adapter and compiled programs: the step's, and the base's own forward's."""
    mesh = make_mesh(parse_mesh(spelled))
    with jax.set_mesh(mesh):
        places = lora.params_shardings(base(quantized), mesh, partition_rules(CONFIG))
        params = jax.device_put(base(quantized), places)
        data = spread(batch(), mesh)
        _, state = start_on_mesh(make_adapter, params, TX, jax.random.key(2), mesh)
        states = jax.tree.map(lambda leaf: leaf.sharding, state)
        step = jax.jit(STEP, out_shardings=(states, None), donate_argnums=0)
        step = step.lower(state, params, data).compile()
        forward = jax.jit(lambda p, b: select_logits(lora.lift(BASE), p, b))
        forward = forward.lower(params, data).compile()
        losses, state = losses_of(step, state, params, data)
    return losses, jax.device_get(state.adapter), step, forward


@pytest.mark.parametrize(("mesh", "quantized"), CASES)
def test_the_losses_are_those_of_one_device(mesh, quantized):
    losses, adapter, *_ = on_mesh(mesh, quantized)
    wanted, wanted_adapter = on_one_device(quantized)
    assert wanted[-1] < wanted[0] - 0.1
    np.testing.assert_allclose(losses, wanted, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), adapter, wanted_adapter)


KINDS = r"all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"


def moved(compiled):
    """(kind, dtype, shape) -> how often, for every array that a collective of the program makes."""
    found = collections.Counter()
    for line in compiled.as_text().splitlines():
        if match := re.search(rf" = (.*?) ({KINDS})(?:-start)?\(", line):
            for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", match[1]):
                sizes = tuple(int(size) for size in shape.split(",") if size)
                found[match[2], dtype, sizes] += 1
    return found


def is_activation(shape):
    """It has the tokens of a row, or those that are learned, along an axis."""
    return LENGTH in shape or LEARNED in shape


@pytest.mark.parametrize(("mesh", "quantized"), CASES)
def test_frozen_weights_move_only_as_in_the_bases_own_forward(mesh, quantized):
    *_, step, forward = on_mesh(mesh, quantized)
    known = set(moved(forward))
    weights = {
        array
        for array in moved(step)
        if not is_activation(array[2]) and RANK not in array[2] and math.prod(array[2]) > 1
    }
    assert weights <= known
    assert {kind for kind, *_ in weights} <= {"all-gather"}
    if "fsdp" in mesh:  # Or the test would show nothing.
        assert len(weights) >= 4
    else:
        assert not weights


@pytest.mark.parametrize("mesh", MESHES)
def test_gradients_that_are_summed_have_the_adapters_size(mesh):
    *_, step, _ = on_mesh(mesh, False)
    summed = [
        (shape, count)
        for (kind, _, shape), count in moved(step).items()
        if kind in ("all-reduce", "reduce-scatter")
        and not is_activation(shape)
        and math.prod(shape) > 1
    ]
    assert all(RANK in shape for shape, _ in summed)
    # One layer's factors; those of a tensor-parallel weight lie in parts already.
    one_layer = sum(leaf.size for leaf in jax.tree.leaves(make_adapter())) // CONFIG.num_layers
    total = sum(math.prod(shape) * count for shape, count in summed)
    assert 0 < total <= one_layer
    if mesh == "data=8":
        assert total == one_layer


def test_everything_lies_where_it_should():
    mesh = make_mesh(parse_mesh("data=2,fsdp=2,tensor=2"))
    with jax.set_mesh(mesh):
        places = lora.params_shardings(base(False), mesh, partition_rules(CONFIG))
        params = jax.device_put(base(False), places)
        _, state = start_on_mesh(make_adapter, params, TX, jax.random.key(2), mesh)
    down = state.adapter["layers/mlp/down_proj/kernel"]
    assert down.lora_a.sharding == NamedSharding(mesh, PartitionSpec(None, "tensor", None))
    assert down.lora_b.sharding == NamedSharding(mesh, PartitionSpec(None, None, "fsdp"))
    moments = state.opt_state[0].mu["layers/mlp/down_proj/kernel"]
    assert moments.lora_a.sharding == down.lora_a.sharding
    plain = init_state(make_adapter(), TX, jax.random.key(2))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
        dataclasses.replace(state, key=0),
        dataclasses.replace(plain, key=0),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data=2,fspd=4", r"expected axes of data, fsdp, tensor, each.*got 'fspd=4'"),
        ("data=2,data=4", r"each once.*got 'data=4'"),
        ("data=2,expert=4", r"got 'expert=4'"),  # Which nothing would be split over.
        ("data=0", r"size of at least 1.*got 'data=0'"),
        ("data", r"got 'data'"),
        ("", r"got ''"),
    ],
)
def test_meshes_that_make_no_sense_are_errors(text, message):
    with pytest.raises(ValueError, match=message):
        parse_mesh(text)


def test_a_mesh_is_of_all_devices():
    with pytest.raises(ValueError, match=r"data=2,tensor=2 is for 4 devices, expected .* all 8"):
        make_mesh({"data": 2, "tensor": 2})


def test_rows_are_split_evenly():
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    check_rows(8, mesh)
    with pytest.raises(ValueError, match=r"rows: expected a multiple of 4.*data=2 x fsdp=2; got 6"):
        check_rows(6, mesh)


def test_accumulating_moves_no_rows():
    """Every device has rows of every micro-batch."""
    mesh = make_mesh({"data": 8})
    step = make_step(lambda a, p, b, key: ((a * b).sum(), b.sum()), optax.sgd(1.0), accumulate=2)
    with jax.set_mesh(mesh):
        rows = spread(np.arange(16 * 3, dtype=np.float32).reshape(16, 3), mesh)
        state = init_state(np.float32(2), optax.sgd(1.0), jax.random.key(0))
        compiled = jax.jit(step).lower(state, 1.0, rows).compile()
    assert {kind for kind, *_ in moved(compiled)} == {"all-reduce"}
    assert all(math.prod(shape) == 1 for _, _, shape in moved(compiled))
