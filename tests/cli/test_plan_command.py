"""`lora-jax plan`: the table, JSON, and what cannot be planned."""

import json
import re
import shlex

import jax
import pytest

import lora_jax as lora
from lora_jax.cli import parse, run
from lora_jax.interop.pretrained import load_pretrained
from lora_jax.training.options import ModelOptions


def said(arguments, capsys):
    assert run(["plan", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_a_known_model_that_does_not_fit_says_what_would(capsys):
    out = said(["--model", "llama-3.1-8b", "--rank", "16"], capsys)
    lines = {" ".join(line.split()) for line in out.splitlines()}
    assert "parameters 8,030,261,248" in lines
    assert "trainable 41,943,040 (0.5223%)" in lines
    assert "memory: base 14.958 GiB" in lines
    plan = lora.plan("llama-3.1-8b", lora.LoraConfig(rank=16, exclude=("lm_head/*",)))
    too_much = (plan.memory.total - 16 * 2**30) / 2**30
    assert f"v5e: does not fit, by arithmetic, {too_much:.3f} GiB too much" in lines
    assert any(line.startswith("v5p: fits, by arithmetic, 77.") for line in lines)
    (advice,) = (line for line in lines if line.startswith("To fit v5e: "))
    assert "--method qlora takes" in advice
    assert "Or --mesh fsdp=2 --batch-size 2, 2 chips, takes" in advice


def test_a_folder_is_planned_from_its_config_alone(model, tmp_path, capsys):
    (tmp_path / "config.json").write_text((model / "config.json").read_text())
    arguments = ["--model", tmp_path, "--seq-len", 128, "--method", "full", "--json"]
    plan = json.loads(said([*arguments, "--dtype", "float32"], capsys))
    loaded = load_pretrained(model)
    assert plan["memory"]["base"] == sum(leaf.nbytes for leaf in jax.tree.leaves(loaded.params))
    assert plan["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(loaded.params))
    assert plan["memory"]["total"] == sum(
        plan["memory"][part] for part in ("base", "gradients", "optimizer", "activations")
    )


def test_qlora_has_its_own_rank_as_in_finetune(capsys):
    base = ["--model", "qwen3-8b", "--json", "--batch-size", "2", "--mesh", "data=2"]
    qlora = json.loads(said([*base, "--method", "qlora"], capsys))
    low_rank = json.loads(said([*base, "--rank", "64"], capsys))
    assert qlora["trainable"] == low_rank["trainable"]
    assert json.loads(said(base, capsys))["trainable"] * 8 == low_rank["trainable"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--model", "llama-3.1-9b"], "Known by name are llama-3.1-8b"),
        (["--model", "llama-3.1-8b", "--mesh", "fsdp=two"], "got 'fsdp=two'"),
        (["--model", "llama-3.1-8b", "--mesh", "fsdp=4"], "expected a multiple of 4, got 1"),
        (["--model", "llama-3.1-8b", "--mesh", "tensor=3"], "k_proj/kernel: axis 2 of shape"),
        (["--model", "llama-3.1-8b", "--rank", "5000"], "rank 5000 is above the smaller side"),
        (["--model", "llama-3.1-8b", "--topology", "h100"], "expected a kind of chip"),
        (["--model", "llama-3.1-8b", "--targets", "*/qkv"], "'*/qkv' matches none"),
        (["--model", "llama-3.1-8b", "--method", "lorra"], "lorra"),
    ],
)
def test_what_cannot_be_planned(given, message, capsys):
    assert run(["plan", *given]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert message in " ".join(error.split())


def test_the_run_that_was_planned_is_printed(capsys):
    asked = ["--method", "qlora", "--mesh", "fsdp=4", "--batch-size", "8", "--seq-len", "512"]
    assert run(["plan", "--model", "llama-3.1-8b", *asked]) == 0
    said = capsys.readouterr().out
    command = shlex.split(re.search(r"Planned is: lora-jax (.*)", said)[1])
    planned = parse(command)
    assert planned.model == ModelOptions(
        "llama-3.1-8b", dtype="bfloat16", remat=True, quantize="nf4"
    )
    assert (planned.lora.rank, planned.data.rows, planned.data.row_length) == (64, 8, 512)
    assert planned.devices.mesh == "fsdp=4"
