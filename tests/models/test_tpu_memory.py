"""The memory of a training step on a 4-bit base, compiled for a TPU v5e without having one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

# In a process of its own: libtpu stays loaded in the one that asked for it.
PROGRAM = """
import json
import jax
from programs import WITHOUT_LIBTPU, base_argument_bytes, frozen_stack, frozen_step, tpu_v5e

stack, chip = frozen_stack("bfloat16"), tpu_v5e()
assert chip, WITHOUT_LIBTPU
compiled = {kind: frozen_step(stack, kind, chip) for kind in ("dense", "nf4")}
print(json.dumps({
    kind: {
        "temporaries": step.memory_analysis().temp_size_in_bytes,
        "base": base_argument_bytes(stack, step),
    }
    for kind, step in compiled.items()
}))
"""
LAYERS, ONE_LAYER = 8, 2048 * 2048 * 2  # Bytes, in bfloat16.


@pytest.fixture(scope="module")
def steps():
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=BENCHMARKS,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(BENCHMARKS.parent)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_temporaries_exceed_those_of_a_dense_base_by_one_layer_at_most(steps):
    assert steps["nf4"]["temporaries"] <= steps["dense"]["temporaries"] + ONE_LAYER


def test_the_base_takes_0_26_of_what_bfloat16_takes(steps):
    assert steps["dense"]["base"] == LAYERS * ONE_LAYER
    assert steps["nf4"]["base"] <= 0.26 * LAYERS * ONE_LAYER
