"""What cannot be used is one message that says what, where and what to do, and exit status 2."""

import errno
import json
import os
import re
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_jax as lora
from lora_jax.checkpoint import read_about
from lora_jax.cli import run
from lora_jax.interop.pretrained import load_pretrained
from lora_jax.training import folder as folder_module
from lora_jax.training.batching import Batch
from lora_jax.training.folder import RunFolder


def refused(arguments, capsys):
    """The message of a command that must refuse its input, on one line."""
    assert run([str(argument) for argument in arguments]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return " ".join(re.sub(r"[│╭╰─╮╯]", " ", said).split())


@pytest.fixture
def finetune(options, tmp_path):
    return ["finetune", *options, "--out", tmp_path / "run"]


@pytest.fixture
def broken_model(model, tmp_path):
    """A copy of the model to be damaged."""
    return shutil.copytree(model, tmp_path / "broken")


def test_a_truncated_weight_file(finetune, broken_model, capsys):
    file = broken_model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    said = refused([*finetune, "--model", broken_model], capsys)
    assert f"{file}: expected a complete safetensors file, got a damaged or truncated one" in said


def test_missing_and_left_over_tensors(finetune, broken_model, capsys):
    file = broken_model / "model.safetensors"
    tensors = load_file(file)
    tensors["model.more.weight"] = tensors.pop("model.norm.weight")
    save_file(tensors, file)
    said = refused([*finetune, "--model", broken_model], capsys)
    assert "missing (1): model.norm.weight" in said
    assert "left over (1): model.more.weight" in said


def test_a_model_that_is_not_there(finetune, capsys):
    said = refused([*finetune, "--model", "no/such/thing"], capsys)
    assert "no/such/thing: no such file or folder" in said


def test_an_architecture_that_is_not_covered(finetune, broken_model, capsys):
    values = json.loads((broken_model / "config.json").read_text())
    (broken_model / "config.json").write_text(json.dumps({**values, "model_type": "gpt2"}))
    said = refused([*finetune, "--model", broken_model], capsys)
    assert "expected one of llama, mistral, qwen2, qwen3, got 'gpt2'" in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"text": "fine"}\n{"text": \n', r"bad\.jsonl:2: not JSON"),
        ('{"prompt": "a", "answer": "b"}\n', r"bad\.jsonl:1: the keys are \['answer', 'prompt'\]"),
        ('{"text": "alone"}\n', r"bad\.jsonl: expected at least 2 records"),
        ('{"text": "%s"}\n' % ("long " * 99) * 2, r"No example to learn from fits .* --row-length"),
    ],
)  # fmt: skip
def test_data_that_cannot_be_used(finetune, tmp_path, capsys, text, message):
    data = tmp_path / "bad.jsonl"
    data.write_text(text)
    said = refused([*finetune, "--data", data], capsys)
    assert re.search(message, said), said
    assert not (tmp_path / "run").exists()


def test_too_many_held_out(finetune, capsys):
    said = refused([*finetune, "--held-out", 60], capsys)
    assert "held_out: expected less than the 60 examples that there are, got 60" in said


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--targets", "*/qproj/kernel"], "the pattern '*/qproj/kernel' matches none of the"),
        (["--targets", "*/input_norm/scale"], "never multiplies with this leaf"),
        (["--rank", "0"], "LoraConfig.rank: expected an integer of at least 1, got 0"),
        (["--rank", "33"], "rank 33 is above the smaller side of the weight"),
        (["--dropout", "1"], "LoraConfig.dropout_rate: expected a number in [0, 1), got 1.0"),
        (["--clip", "-1"], "clip: expected 0 or more, got -1.0"),
        (["--row-length", "300"], "row_length: expected at most the model's 256, got 300"),
        (["--rank", "many"], "invalid"),
        (["--no-such-option"], "no-such-option"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit(finetune, tmp_path, capsys, given, message):
    assert message in refused([*finetune, *given], capsys)
    assert not (tmp_path / "run").exists()


def test_a_rank_of_half_the_smaller_side_is_a_warning(finetune):
    with pytest.warns(UserWarning, match="rank 8 is at least half the smaller side"):
        assert run([*map(str, finetune), "--rank", "8", "--steps", "1", "--evaluations", "0"]) == 0


def test_an_output_folder_with_a_run_is_refused_before_anything_is_loaded(trained, capsys):
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    said = refused(["finetune", "--model", "no/such", "--out", trained], capsys)
    assert f"{trained} already holds a run. Go on with it (--resume)" in said
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == before


def test_overwriting_waits_until_the_new_input_is_read(trained, tmp_path, capsys):
    copy = shutil.copytree(trained, tmp_path / "copy")
    refused(["finetune", "--model", "no/such", "--out", copy, "--overwrite"], capsys)
    assert (copy / "adapter").is_dir()
    assert (copy / "metrics.jsonl").read_text() == (trained / "metrics.jsonl").read_text()


def test_going_on_with_what_is_not_there_or_another_run(trained, tmp_path, capsys):
    nothing = ["finetune", "--resume", "--out", tmp_path / "nothing"]
    assert "holds no run to go on with" in refused(nothing, capsys)
    copy = shutil.copytree(trained, tmp_path / "copy")
    again = ["finetune", "--resume", "--out", copy]
    assert "made with other examples" in refused([*again, "--held-out", 7], capsys)
    assert "expected float32[2, 32, 2], got float32[2, 32, 4]" in refused(
        [*again, "--rank", 2], capsys
    )
    assert "at step 8, beyond --steps 5" in refused([*again, "--steps", 5], capsys)


def test_an_adapter_of_another_base(trained, broken_model, tmp_path, capsys):
    file = broken_model / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + np.float32(1)
    save_file(tensors, file)
    for command in (["generate", "--prompt", "a"], ["merge", "--out", tmp_path / "merged"]):
        said = refused([*command, "--adapter", trained, "--model", broken_model], capsys)
        assert "the adapter was made for another base" in said
    assert not (tmp_path / "merged").exists()


def test_folders_that_are_no_adapter(tmp_path, trained, capsys):
    for command in (["generate", "--prompt", "a"], ["inspect"], ["merge", "--out", tmp_path / "m"]):
        said = refused([*command, "--adapter", tmp_path], capsys)
        assert "is not an adapter saved by lora_jax" in said
    alone = shutil.copytree(trained / "adapter", tmp_path / "alone" / "adapter")
    said = refused(["merge", "--adapter", alone, "--out", tmp_path / "m"], capsys)
    assert "Name it with --model" in said


def test_a_damaged_adapter(trained, tmp_path, capsys):
    copy = shutil.copytree(trained, tmp_path / "copy")
    for folder in (copy / "adapter", copy / "checkpoints" / "8"):
        for file in (folder / "adapter").rglob("*"):
            if file.is_file() and file.stat().st_size > 500:
                file.write_bytes(file.read_bytes()[:100])
        given = copy if folder.name == "8" else folder
        said = refused(["generate", "--adapter", given, "--prompt", "a"], capsys)
        assert f"{folder}: the checkpoint cannot be read" in said


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_damaged_checkpoint_names_the_one_before_and_goes_on_from_it(trained, tmp_path, capsys):
    copy = shutil.copytree(trained, tmp_path / "copy")
    about = copy / "checkpoints" / "8" / "about" / "metadata"
    for damage, message in (
        (about.unlink, f"{copy}/checkpoints/8 is not an adapter saved by lora_jax: expected"),
        (lambda: about.write_text('{"format": 99}'), "written in format 99"),
    ):
        damage()
        before = contents(copy)
        said = refused(["finetune", "--resume", "--out", copy], capsys)
        assert message in said
        assert "whole is step 4. Nothing was changed. Go on from it: lora-jax finetune" in said
        assert f"finetune --resume --out {copy} --resume-from 4" in said
        assert contents(copy) == before
    assert run(["finetune", "--resume", "--out", str(copy), "--resume-from", "4"]) == 0
    one, two = (RunFolder(folder).metrics() for folder in (copy, trained))
    assert [{**entry, "seconds": 0} for entry in one] == [{**entry, "seconds": 0} for entry in two]
    assert read_about(copy / "adapter") == read_about(trained / "adapter")
    said = refused(["finetune", "--out", copy, "--resume-from", 4], capsys)
    assert "resume_from: expected it together with --resume, got 4" in said


def test_checkpoints_of_something_else_are_kept(trained, tmp_path, capsys):
    copy = shutil.copytree(trained, tmp_path / "copy")
    for step in ("4", "8"):
        shutil.rmtree(copy / "checkpoints" / step / "about")
    before = contents(copy)
    said = refused(["finetune", "--resume", "--out", copy], capsys)
    assert "checkpoints: expected steps saved by lora_jax" in said
    assert contents(copy) == before


def test_a_merge_does_not_write_into_a_full_folder(trained, capsys):
    said = refused(["merge", "--adapter", trained, "--out", trained], capsys)
    assert "expected a new or empty folder" in said


def test_an_empty_prompt(model, capsys):
    said = refused(["generate", "--model", model, "--prompt", ""], capsys)
    assert "prompt: expected some text" in said


def test_a_full_disk_keeps_the_adapter_of_the_last_save(finetune, model, tmp_path, capsys):
    """It is full when Orbax, in the background, gives the complete checkpoint its name."""
    rename = os.rename

    def full_at_the_last(source, target, **options):
        if os.path.basename(target) == "8":
            raise OSError(errno.ENOSPC, "No space left on device")
        rename(source, target, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "rename", full_at_the_last)
        said = refused(finetune, capsys)
    folder = tmp_path / "run"
    assert "no room on the disk: step 8 was not saved" in said
    assert f"what was saved before is whole, in {folder / 'checkpoints' / '4'}" in said
    assert "go on with --resume" in said
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["4"]
    assert run(["finetune", "--resume", "--out", str(folder)]) == 0


def test_a_loss_that_is_not_finite(finetune, model, tmp_path, capsys, monkeypatch):
    """Step 3 is poisoned through its batch's weights, as bad data would."""
    from lora_jax.commands import finetune as command

    batches = command.make_batches

    def poisoned(*arguments, **options):
        inner = batches(*arguments, **options)

        class Poisoned:
            count = 0

            def __next__(self) -> Batch:
                self.count += 1
                batch = next(inner)
                weights = batch.select_weights * (np.nan if self.count == 3 else 1)
                return batch._replace(select_weights=weights.astype(np.float32))

            def get_state(self):
                return inner.get_state()

        return Poisoned()

    monkeypatch.setattr(command, "make_batches", poisoned)
    said = refused(finetune, capsys)
    assert "step 3: the loss is nan" in said
    assert "letters.jsonl:" in said
    assert f"The last good adapter, after step 2, is in {tmp_path / 'run' / 'adapter'}" in said
    base = load_pretrained(model, scan_layers=True)
    adapter, _ = lora.restore(tmp_path / "run" / "adapter", base.params)
    leaf = adapter["layers/mlp/up_proj/kernel"].lora_b
    assert np.isfinite(leaf).all()
    assert np.abs(leaf).max() > 0
    monkeypatch.setattr(command, "make_batches", batches)
    assert run(["finetune", "--resume", "--out", str(tmp_path / "run")]) == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    assert [entry["step"] for entry in steps if entry["kind"] == "train"] == list(range(1, 9))


def test_defects_of_the_program_keep_their_traceback(finetune, monkeypatch):
    from lora_jax.commands import finetune as command

    def defect(*arguments, **options):
        raise ValueError("a defect")

    monkeypatch.setattr(command, "_report", defect)
    with pytest.raises(ValueError, match="a defect"):
        run([*map(str, finetune), "--steps", "1", "--evaluations", "0"])


def test_the_traceback_is_there_when_asked_for(trained, monkeypatch):
    monkeypatch.setenv("LORA_JAX_DEBUG", "1")
    with pytest.raises(folder_module.FolderError):
        run(["finetune", "--out", str(trained)])
