"""A run that is killed again and again ends as one that never was."""

import os
import random
import subprocess
import sys
import time

import numpy as np
import pytest

import lora_jax as lora
from lora_jax.cli import run
from lora_jax.interop.pretrained import load_pretrained
from lora_jax.training.folder import RunFolder

PROGRAM = "from lora_jax.cli import main; main()"
# Saves take most of the time, so most of the kills fall into one.
RUN = ["--steps", "200", "--evaluations", "9", "--save-every", "2", "--dropout", "0.1"]
KILLS = 20


def entries(folder):
    return [{**entry, "seconds": 0} for entry in RunFolder(folder).metrics()]


def bytes_of_metrics(folder):
    file = folder / "metrics.jsonl"
    return file.stat().st_size if file.is_file() else 0


def kill(process, folder, rng):
    """Kills it at a random moment: before it has begun to train, or some steps later."""
    deadline = time.monotonic() + 120
    begun = bytes_of_metrics(folder)
    if rng.random() < 0.25:
        time.sleep(rng.uniform(0.5, 4))
    else:
        grows_by = 150 * rng.randint(1, 10)  # about that many steps
        while process.poll() is None and bytes_of_metrics(folder) < begun + grows_by:
            assert time.monotonic() < deadline
            # Going on cuts off what is done again.
            begun = min(begun, bytes_of_metrics(folder))
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.1))
    process.kill()
    return process.communicate()[1]


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX here")
def test_killed_at_twenty_random_moments_it_ends_as_if_it_never_was(options, model, tmp_path):
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    environment = {
        **os.environ,
        "JAX_NUM_CPU_DEVICES": "8",  # as in this process
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    rng = random.Random(7)
    killed_at, in_saves = [], 0
    for number in range(KILLS + 1):
        begun = (broken / "run.json").is_file()
        arguments = ["--resume"] if begun else [*options, *RUN]
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, "finetune", *arguments, "--out", str(broken)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        try:
            said = kill(process, broken, rng) if number < KILLS else process.communicate()[1]
        finally:
            process.kill()
        assert process.returncode == (-9 if number < KILLS else 0), said
        assert "Traceback" not in said
        killed_at.append(len(entries(broken)))
        in_saves += any((broken / "checkpoints").glob("*.orbax-checkpoint-tmp"))
    assert len(set(killed_at)) > KILLS / 2, killed_at
    assert in_saves > KILLS / 4
    assert run(["finetune", *options, *RUN, "--out", str(whole)]) == 0
    assert entries(broken) == entries(whole)
    assert [e["step"] for e in entries(broken) if e["kind"] == "train"] == list(range(1, 201))
    base = load_pretrained(model, scan_layers=True)
    one, two = (lora.restore(folder / "adapter", base.params)[0] for folder in (broken, whole))
    for path, update in one.items():
        np.testing.assert_array_equal(update.lora_a, two[path].lora_a)
        np.testing.assert_array_equal(update.lora_b, two[path].lora_b)
    steps = [sorted(p.name for p in (f / "checkpoints").iterdir()) for f in (broken, whole)]
    assert steps[0] == steps[1]
