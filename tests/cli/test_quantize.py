"""`--quantize` and `--paged`, from end to end, with a tiny model."""

import json
import re
import shutil

import jax
import numpy as np
import pytest

import lora_jax as lora
from lora_jax.cli import parse, run
from lora_jax.interop.pretrained import load_pretrained
from lora_jax.quantization.formats import Format
from lora_jax.training.options import FinetuneOptions


@pytest.fixture(scope="module")
def quantized(tmp_path_factory, options):
    """The folder of a finished run on a 4-bit base, and the same run with its state paged."""
    folder = tmp_path_factory.mktemp("quantized")
    for name, more in (("run", ()), ("paged", ("--paged",))):
        arguments = ["finetune", *options, "--quantize", "nf4", *more, "--out", str(folder / name)]
        assert run(arguments) == 0
    return folder / "run"


def losses(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [entry["loss"] for entry in lines if entry["kind"] == "evaluation"]


def test_it_learns_and_paging_changes_no_number(quantized):
    learned = losses(quantized)
    assert learned[-1] < 0.7 * learned[0]
    assert losses(quantized.parent / "paged") == learned


def test_the_base_really_has_4_bits(quantized, trained, model):
    base = load_pretrained(model, scan_layers=True, quantize=Format(), compute_dtype="float32")
    adapter, _ = lora.restore(quantized / "adapter", base.params)
    assert isinstance(base.params["layers"]["mlp"]["up_proj"]["kernel"], lora.Quantized)
    assert len(adapter) == 7
    plain = load_pretrained(model, scan_layers=True)
    with pytest.raises(ValueError, match=r"expected nf4, blocks of 64, double, got plain numbers"):
        lora.restore(quantized / "adapter", plain.params)
    assert losses(quantized)[0] != losses(trained)[0]


def test_going_on_keeps_the_format_and_the_numbers(quantized, tmp_path):
    folder = tmp_path / "again"
    shutil.copytree(quantized, folder)
    assert run(["finetune", "--resume", "--out", str(folder), "--steps", "10"]) == 0
    assert json.loads((folder / "run.json").read_text())["options"]["model"]["quantize"] == "nf4"
    assert len(losses(folder)) > len(losses(quantized))


def test_going_on_with_another_base_is_refused(quantized, tmp_path, capsys):
    folder = tmp_path / "again"
    shutil.copytree(quantized, folder)
    go_on = ["finetune", "--resume", "--out", str(folder), "--steps", "10"]
    for other, message in (("fp4", "expected nf4, .* got fp4"), ("None", "got plain numbers")):
        assert run([*go_on, "--quantize", other]) == 2
        assert re.search(f"made on another base.*{message}", capsys.readouterr().err)
    assert losses(folder) == losses(quantized)


def test_an_adapter_alone_knows_its_format(quantized, model, tmp_path, capsys):
    shutil.copytree(quantized / "adapter", tmp_path / "adapter")
    arguments = ["generate", "--adapter", str(tmp_path / "adapter"), "--model", str(model)]
    assert run([*arguments, "--prompt", "abbabba"]) == 0
    capsys.readouterr()


def test_inspect_and_generate_know_the_format(quantized, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert run(["inspect", "--adapter", str(quantized)]) == 0
    said = capsys.readouterr().out
    assert "bits" in said
    assert "The base takes" in said
    assert run(["generate", "--adapter", str(quantized), "--prompt", "abbabba"]) == 0
    assert capsys.readouterr().out.strip() in ("a", "b")


def test_merge_makes_a_plain_model(quantized, model, tmp_path):
    assert run(["merge", "--adapter", str(quantized), "--out", str(tmp_path / "plain")]) == 0
    base = load_pretrained(model, scan_layers=True, quantize=Format(), compute_dtype="float32")
    adapter, _ = lora.restore(quantized / "adapter", base.params)
    written = load_pretrained(tmp_path / "plain", scan_layers=True).params
    jax.tree.map(np.testing.assert_array_equal, written, lora.merge(base.params, adapter))


def test_the_flag_brings_the_papers_recipe_unless_told_otherwise():
    options = parse(["finetune", "--quantize", "nf4"])
    assert (options.lora.rank, options.lora.alpha) == (64, 16)
    assert (options.optimizer.schedule, options.optimizer.clip) == ("constant", 0.3)
    assert options.lora.targets == ("all-linear",)
    told = parse(["finetune", "--quantize", "fp4", "--rank", "4", "--schedule", "linear"])
    assert (told.lora.rank, told.optimizer.schedule) == (4, "linear")
    assert told.lora.alpha == 16
    assert parse(["finetune"]) == FinetuneOptions()


def test_a_weight_that_is_not_finite_stops_before_training(model, tmp_path, options, capsys):
    from safetensors.numpy import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][2, 3] = np.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    arguments = ["finetune", *options, "--model", str(broken), "--quantize", "nf4"]
    assert run([*arguments, "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert "layers/1/mlp/up_proj/kernel" in said or "layers/mlp/up_proj/kernel" in said
    assert "1 of its" in said
    assert not (tmp_path / "run").exists()
