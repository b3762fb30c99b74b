"""`lora-jax merge`: base and adapter as one model in Hugging Face's layout."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from lora_jax.commands import trained
from lora_jax.commands.errors import InputError, reading_input
from lora_jax.interop.huggingface import save_pretrained
from lora_jax.merging import merge as merge_weights


@dataclasses.dataclass(frozen=True)
class MergeOptions:
    """Write base and adapter as one plain model, which transformers loads.

    Attributes:
        adapter: Folder of a run, or of an adapter.
        out: Folder to write: config.json, safetensors and the tokenizer. New or empty.
        model: The base: a folder, a .gguf file, a hub id, or smollm2-135m-instruct. By default the
            one that the adapter was trained on.
    """

    adapter: Path
    out: Path
    model: str | None = None


def merge(options: MergeOptions, console: Console) -> None:
    """Runs `lora-jax merge`.

    Raises:
        InputError: the model or the adapter cannot be used, or the folder holds something.
    """
    with reading_input():
        # Before anything is loaded.
        if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
            raise InputError(
                f"{options.out}: expected a new or empty folder, got one that holds files. Choose "
                "another (--out), or remove it first."
            )
        model, adapter, _ = trained.find(options.adapter).load(options.model)
        merged = merge_weights(model.params, adapter)
        save_pretrained(options.out, model.config, merged, tokenizer=model.tokenizer)
    console.print(
        f"{len(adapter)} weights of {escape(model.name)} merged. In {escape(str(options.out))}: "
        f"{', '.join(sorted(path.name for path in options.out.iterdir()))}"
    )
