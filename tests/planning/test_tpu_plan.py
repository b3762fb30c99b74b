"""The TPU's compiler, asked for a small decoder on 2 x 2 chips that are not there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# In a process of its own: libtpu stays loaded in the one that asked for it.
PROGRAM = """
import dataclasses, json
import jax
import lora_jax as lora
from lora_jax.commands.plan import as_json
from lora_jax.models.config import DecoderConfig

config = lora.LoraConfig(rank=8, exclude=("lm_head/*",))
plans = {}
for layers in (2, 5):
    model = DecoderConfig(
        vocab_size=2048, hidden_size=256, intermediate_size=1024, num_layers=layers, num_heads=4,
        num_kv_heads=2, head_dim=64)
    plan = lora.plan(
        model, config, mesh={"fsdp": 2, "tensor": 2}, batch_size=4, seq_len=256, topology="v5e:2x2")
    plans[layers] = as_json(plan)
refused = {}
wide = dataclasses.replace(
    model, vocab_size=1152, hidden_size=1152, intermediate_size=1152, num_heads=128,
    num_kv_heads=128)
for mesh, topology in (({"fsdp": 2, "tensor": 128}, "v5e:16x16"), ({"fsdp": 9}, "v5e:3x3")):
    try:
        lora.plan(wide, config, mesh=mesh, batch_size=18, topology=topology)
    except ValueError as error:
        refused[topology] = str(error)
print(json.dumps({"plans": plans, "refused": refused, "backend": jax.default_backend()}))
"""


@pytest.fixture(scope="module")
def answer():
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TPU_")}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env={**environment, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr == "", "libtpu is quiet"
    return json.loads(run.stdout)


@pytest.fixture(scope="module")
def plans(answer):
    return answer["plans"]


def test_the_peak_holds_what_stays_and_little_more(plans):
    for plan in plans.values():
        memory, compiled = plan["memory"], plan["compiled"]
        kept = memory["base"] + memory["adapter"] + memory["optimizer"]
        assert compiled["fits"]
        assert kept < compiled["peak"] < 1.1 * memory["total"]
        assert plan["spare"] == {"v5e": 16 * 2**30 - compiled["peak"]}


def test_flops_grow_with_the_layers_as_the_formula_says(plans):
    """A scan's body counts as often as it turns: 3 more layers, 3 times what one takes."""
    compiled = plans["5"]["compiled"]["flops"] - plans["2"]["compiled"]["flops"]
    tokens, chips = 4 * 256, 4
    formula = plans["5"]["flops"]["step"] - plans["2"]["flops"]["step"]
    # The rank is not split over `tensor`, so some products with A and B are made twice.
    assert formula * tokens / chips < compiled < 1.05 * formula * tokens / chips


def test_collectives_by_kind(plans):
    few, many = (plans[layers]["compiled"]["collectives"] for layers in ("2", "5"))
    for kind in few:
        assert (many[kind]["count"] - few[kind]["count"]) % 3 == 0, kind
    # Heads and hidden units are summed over `tensor` twice a layer, forward and backward: arrays
    # of [2, 256, 256] in bfloat16, in a ring of two.
    sums = many["all-reduce"]["nbytes"] - few["all-reduce"]["nbytes"]
    assert 3 * 4 <= sums / (2 * 256 * 256 * 2) < 3 * 10
    assert many["all-reduce"]["count"] - few["all-reduce"]["count"] >= 3 * 4
    # Each layer's kernels are gathered over `fsdp`, forward and backward, in one way or another.
    kernels = 256 * (2 * 256 + 2 * 128 + 3 * 1024) * 2 // 2  # Bytes; half of them, for `tensor`.
    gathered = sum(
        many[kind]["nbytes"] - few[kind]["nbytes"] for kind in ("all-gather", "collective-permute")
    )
    assert gathered >= 3 * 2 * kernels // 2  # The other half is there.


def test_what_cannot_be_laid_out(answer):
    assert "whole sides of its grid, 16 x 16" in answer["refused"]["v5e:16x16"]
    assert "libtpu knows no v5e:3x3" in answer["refused"]["v5e:3x3"]


def test_the_process_keeps_its_backend(answer):
    assert answer["backend"] == "cpu"
