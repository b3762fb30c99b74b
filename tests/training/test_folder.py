"""A run's folder: nothing is lost, nothing is half written, nothing foreign is touched."""

import errno
import json

import pytest

from lora_jax.training.folder import DiskFull, FolderError, RunFolder


@pytest.fixture
def folder(tmp_path):
    made = RunFolder(tmp_path / "run")
    made.begin({"options": {}})
    return made


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


def test_what_a_process_killed_at_once_left_does_not_stand_in_the_way(tmp_path):
    (tmp_path / "run.json.new").write_text('{"opt')
    RunFolder(tmp_path).check_new(overwrite=False)
    RunFolder(tmp_path).begin({"options": {}})
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_overwriting_removes_the_run_and_nothing_else(folder):
    for name in (folder.adapter, folder.checkpoints / "3"):
        name.mkdir(parents=True)
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
    folder.log({"kind": "evaluation", "step": 0})
    folder.forget_after(0)
    assert folder.metrics() == []


@pytest.mark.parametrize("write", ["log", "write", "describe"])
def test_a_full_disk_says_what_there_is(folder, monkeypatch, write):
    arguments = {"log": [{"step": 4}], "write": ["results.json", "{}"], "describe": [{}]}[write]

    def full(self, *args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pathlib.Path.open", full)
    with pytest.raises(DiskFull, match="nothing has been saved"):
        getattr(folder, write)(*arguments)
    (folder.checkpoints / "3").mkdir(parents=True)
    with pytest.raises(DiskFull, match=f"saved before is whole, in {folder.checkpoints / '3'}"):
        getattr(folder, write)(*arguments)
    assert sorted(path.name for path in folder.path.iterdir()) == ["checkpoints", "run.json"]


def test_a_damaged_description_is_an_error(folder):
    (folder.path / "run.json").write_text('{"options": ')
    with pytest.raises(FolderError, match=r"run\.json: damaged"):
        folder.about()
    with pytest.raises(FolderError, match="holds no run to go on with"):
        RunFolder(folder.path / "elsewhere").about()
