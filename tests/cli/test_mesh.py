"""`--mesh` on eight simulated devices, and several hosts as several processes on this machine."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

import lora_jax as lora
from lora_jax.cli import run
from lora_jax.interop.pretrained import load_pretrained

PROGRAM = "from lora_jax.cli import main; main()"
MESH = ["--mesh", "data=2,fsdp=2,tensor=2"]
ROWS = ["--rows", "8"]


def entries(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{**entry, "seconds": 0} for entry in map(json.loads, lines)]


def assert_alike(one, two):
    """The same steps with the same losses, up to the order of sums."""
    assert [(e["kind"], e["step"]) for e in one] == [(e["kind"], e["step"]) for e in two]
    losses = [[entry["loss"] for entry in each] for each in (one, two)]
    np.testing.assert_allclose(*losses, atol=1e-5)


def test_a_mesh_changes_no_loss_and_no_use_of_the_adapter(options, tmp_path, model):
    folder = tmp_path / "run"
    # The first half on one mesh, the second on another: what is saved belongs to neither.
    half = ["--steps", "4", "--schedule", "constant", "--warmup", "0"]
    begun = ["finetune", *options, *ROWS, *half, *MESH, "--out", str(folder)]
    assert run(begun) == 0
    again = ["finetune", "--resume", "--steps", "8", "--mesh", "fsdp=8", "--out", str(folder)]
    assert run(again) == 0
    whole = tmp_path / "whole"
    assert run(["finetune", *options, *ROWS, *half, "--steps", "8", "--out", str(whole)]) == 0
    trained = [[e for e in entries(f) if e["kind"] == "train"] for f in (folder, whole)]
    assert_alike(*trained)
    assert run(["generate", "--adapter", str(folder), "--prompt", "aab"]) == 0
    base = load_pretrained(model, scan_layers=True)
    one, two = (lora.restore(f / "adapter", base.params)[0] for f in (folder, whole))
    for path, update in one.items():
        np.testing.assert_allclose(update.lora_b, two[path].lora_b, atol=1e-4)


def test_micro_batches_are_the_same_on_a_mesh(options, tmp_path):
    more = ["--rows", "4", "--accumulate", "2", "--steps", "3"]
    for name, mesh in (("alone", []), ("mesh", ["--mesh", "data=4,tensor=2"])):
        assert run(["finetune", *options, *more, *mesh, "--out", str(tmp_path / name)]) == 0
    assert_alike(entries(tmp_path / "alone"), entries(tmp_path / "mesh"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*MESH, "--rows", "6"], r"rows: expected a multiple of 4, .*data=2 x fsdp=2; got 6"),
        (["--mesh", "data=4", *ROWS], r"mesh: data=4 is for 4 devices, expected one for all 8"),
        (["--mesh", "data=4,model=2", *ROWS], r"mesh: expected axes of data, .* got 'model=2'"),
        (
            ["--mesh", "tensor=8"],
            r"embed/embedding: axis 0 of shape \(258, 32\) cannot be split over tensor=8",
        ),
        (
            ["--mesh", "data=4,tensor=2", *ROWS, "--quantize", "nf4"],
            r"o_proj/kernel: scales of its quantized form: axis 2 .* cannot be split over tensor=2",
        ),
        (["--num-hosts", "2"], r"num_hosts: expected it together with coordinator=HOST:PORT"),
        (["--coordinator", "auto", "--host-id", "1"], r"host_id: expected it together with"),
        (["--coordinator", "10.0.0.1:80"], r"num_hosts: expected a number, since coordinator="),
        (
            ["--coordinator", "10.0.0.1:80", "--num-hosts", "2", "--host-id", "2"],
            r"host_id: expected a number from 0 to num_hosts - 1, got 2 of 2",
        ),
        (
            ["--coordinator", "10.0.0.1", "--num-hosts", "2", "--host-id", "1"],
            r"coordinator: expected HOST:PORT, got '10\.0\.0\.1'",
        ),
    ],
)
def test_what_does_not_fit_is_one_message(options, tmp_path, capsys, arguments, message):
    folder = tmp_path / "run"
    assert run(["finetune", *options, *arguments, "--out", str(folder)]) == 2
    said = capsys.readouterr().err
    assert re.search(message, said), said
    assert "Traceback" not in said
    assert not folder.exists()


def start(host, port, arguments):
    """One of two hosts with four devices each."""
    who = ["--coordinator", f"127.0.0.1:{port}", "--num-hosts", "2", "--host-id", str(host)]
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "finetune", *arguments, *who],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "4"},
    )  # fmt: skip


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def both(arguments, meanwhile=lambda hosts: None):
    """Runs two hosts to their ends: what each printed, on stdout and stderr."""
    port = free_port()
    hosts = [start(host, port, arguments) for host in (0, 1)]
    try:
        meanwhile(hosts)
        said = [host.communicate(timeout=240) for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    assert [host.returncode for host in hosts] == [0, 0], said
    return said


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX here")
def test_two_hosts_are_one_run(options, tmp_path):
    """Told to stop on one host, both stop after the same step, and go on as if nothing had been.

    Slow, since it starts four processes.
    """
    folder, whole = tmp_path / "hosts", tmp_path / "whole"
    steady = [*ROWS, *MESH, "--steps", "300", "--schedule", "constant", "--warmup", "0"]
    common = [*options, *steady, "--evaluations", "0", "--save-every", "5"]

    def stop_the_second(hosts):
        deadline = time.monotonic() + 200
        metrics = folder / "metrics.jsonl"
        while not metrics.is_file() or len(entries(folder)) < 8:
            assert all(host.poll() is None for host in hosts), [h.communicate() for h in hosts]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        hosts[1].send_signal(signal.SIGTERM)

    said = both([*common, "--out", str(folder)], stop_the_second)
    steps = [int(re.search(r"Stopped after step (\d+)\.", errors)[1]) for _, errors in said]
    assert steps[0] == steps[1] < 300
    assert lora.latest_step(folder / "checkpoints") == steps[0]
    assert entries(folder)[-1]["step"] == steps[0]
    assert "Model:" in said[0][0]
    # The first shows how it goes. (What JAX's CPU devices talk over prints something of its own.)
    shown = ("Model:", "training", "Held out", "Data:")
    assert all(word in said[0][0] for word in shown)
    assert not any(word in said[1][0] for word in shown)

    end = ["--steps", str(steps[0] + 4), "--out", str(folder)]
    both(["--resume", *end])
    arguments = [*common, "--steps", str(steps[0] + 4), "--out", str(whole)]
    assert run(["finetune", *arguments]) == 0
    assert_alike(entries(folder), entries(whole))
