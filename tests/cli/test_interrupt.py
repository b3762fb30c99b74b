"""Ctrl-C and SIGTERM, sent to a real process, and going on from there."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import lora_jax as lora
from lora_jax.cli import run
from lora_jax.interop.pretrained import load_pretrained

PROGRAM = "from lora_jax.cli import main; main()"
# A schedule that does not depend on the number of steps, which differs below.
CONSTANT = ["--schedule", "constant", "--warmup", "0", "--evaluations", "0"]
MANY = ["--steps", "400", *CONSTANT]


def entries(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{**entry, "seconds": 0} for entry in map(json.loads, lines)]


def interrupted(arguments, folder, signum):
    """Exit status, message and last step of a run that gets a signal after six more entries."""
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "8"}  # as in this process
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "finetune", *arguments, "--out", str(folder)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    metrics = folder / "metrics.jsonl"
    begun = len(entries(folder)) if metrics.is_file() else 0
    try:
        deadline = time.monotonic() + 120
        while not metrics.is_file() or len(entries(folder)) < begun + 6:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signum)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "Traceback" not in said
    assert f"Go on with: lora-jax finetune --resume --out {folder}" in said
    step = int(said.split("Stopped after step ")[1].split(".")[0])
    assert entries(folder)[-1]["step"] == step
    assert begun + 5 <= step < 400
    return process.returncode, step


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX here")
def test_signals_save_and_resume_goes_on_exactly(options, model, tmp_path):
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    assert interrupted([*options, *MANY], broken, signal.SIGTERM)[0] == 0
    status, step = interrupted(["--resume"], broken, signal.SIGINT)
    assert status == 130
    # Ten more steps, with the other options as they were; and the same without a break.
    more = ["--steps", str(step + 10)]
    assert run(["finetune", "--resume", *more, "--out", str(broken)]) == 0
    assert run(["finetune", *options, *MANY, *more, "--out", str(whole)]) == 0
    assert entries(broken) == entries(whole)
    abouts = [json.loads((folder / "run.json").read_text()) for folder in (broken, whole)]
    for about in abouts:
        assert about["steps"] == about["options"]["steps"] == step + 10
        assert about["options"].pop("out") == str(broken if about is abouts[0] else whole)
    assert abouts[0] == abouts[1]
    base = load_pretrained(model, scan_layers=True)
    one, two = (lora.restore(folder / "adapter", base.params)[0] for folder in (broken, whole))
    for path, update in one.items():
        np.testing.assert_array_equal(update.lora_a, two[path].lora_a)
        np.testing.assert_array_equal(update.lora_b, two[path].lora_b)
