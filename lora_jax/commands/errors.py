"""Which errors are the input's fault, and shown as one message without a traceback."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from lora_jax.checkpoint import CheckpointError
from lora_jax.interop.assets import AssetError
from lora_jax.planning.chips import CompilerError
from lora_jax.training.folder import DiskFull, FolderError
from lora_jax.training.loop import NonFiniteLoss
from lora_jax.training.records import DataError


class InputError(Exception):
    """Something the user gave cannot be used; the message says what, where and what to do."""


# Raised for nothing else, so they are the input's fault wherever they come from.
INPUT_ERRORS = (
    InputError, AssetError, CheckpointError, CompilerError, DataError, DiskFull, FolderError,
    NonFiniteLoss,
)  # fmt: skip


@contextlib.contextmanager
def reading_input() -> Iterator[None]:
    """Around code that reads what the user gave: there, a ValueError or OSError is about it.

    Elsewhere the same errors are defects of this program, and keep their traceback.
    """
    try:
        yield
    except INPUT_ERRORS:
        raise
    except OSError as error:
        text = (
            str(error)
            if error.strerror is None or error.filename is None
            else (f"{error.filename}: {error.strerror}")
        )
        raise InputError(text) from error
    except (ValueError, KeyError) as error:
        raise InputError(str(error)) from error
