"""A trained adapter with what its run says about it, from the run's folder."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from lora_jax import checkpoint
from lora_jax.commands.errors import InputError
from lora_jax.config import LoraConfig
from lora_jax.interop.huggingface import read_json
from lora_jax.interop.pretrained import Pretrained, load_pretrained
from lora_jax.interop.tokenizer import Tokenizer
from lora_jax.quantization.formats import Format
from lora_jax.training.folder import ADAPTER, CHECKPOINTS, RUN
from lora_jax.training.tasks import PromptForm
from lora_jax.tree import Update


@dataclasses.dataclass(frozen=True)
class Trained:
    """An adapter on disk.

    Attributes:
        path: its checkpoint.
        about: what the checkpoint says of itself, see `checkpoint.read_about`.
        run: what `run.json` says, empty if there is none beside the checkpoint.
    """

    path: Path
    about: dict[str, Any]
    run: dict[str, Any]

    @property
    def scanned(self) -> bool:
        """Whether its base has the layers stacked."""
        return not any(path.startswith("layers/0/") for path in self.about["base"]["leaves"])

    @property
    def dtype(self) -> str:
        """Of its base's parameters."""
        return self.about["base"]["leaves"]["embed/embedding"].split("[")[0]

    def format(self, source: str) -> Format | None:
        """In which its base is to be quantized; None if it is not, or is in 4 bits in its files."""
        stored = next(iter(self.about["base"]["quantized"].values()), None)
        config = Path(source) / "config.json"
        if stored is None or (config.is_file() and "quantization_config" in read_json(config)):
            return None
        return Format(stored["format"], stored["block_size"], stored["double_quant"])

    def form(self, tokenizer: Tokenizer) -> PromptForm:
        """What was around the prompts in training; a chat if that is not known and can be.

        Raises:
            InputError: `run.json` says it wrongly.
        """
        if "prompt" not in self.run:
            return PromptForm(chat=tokenizer.chat_template is not None)
        try:
            return PromptForm(**self.run["prompt"])
        except TypeError as error:
            raise InputError(
                f"{self.path}: prompt in its {RUN}: expected chat, system and suffix, got "
                f"{self.run['prompt']!r}."
            ) from error

    def load(self, model: str | None) -> tuple[Pretrained, dict[str, Update], LoraConfig]:
        """Loads the base, in the layout that the adapter was trained in, and the adapter.

        Args:
            model: the base; `None` for the one that the run names.

        Raises:
            InputError: no base is named.
            ValueError, OSError: the base cannot be loaded, or is another one.
        """
        source = model or self.run.get("model")
        if source is None:
            raise InputError(
                f"{self.path}: there is no {RUN} beside the adapter that names its base. Name it "
                "with --model."
            )
        base = load_pretrained(
            source,
            dtype=self.dtype,
            scan_layers=self.scanned,
            quantize=self.format(source),
            compute_dtype=self.dtype,
        )
        adapter, config = checkpoint.restore(self.path, base.params)
        return base, adapter, config


def find(folder: Path) -> Trained:
    """Finds an adapter: of a run's last checkpoint, or in a folder of its own.

    Args:
        folder: of a run, of its checkpoints or one of them, or of an adapter.

    Raises:
        CheckpointError: there is none, or it is damaged.
        InputError: `run.json` is damaged, or the adapter's base is not a decoder of ours.
    """
    path = _adapter(folder.absolute())
    about = checkpoint.read_about(path)
    file = next((parent / RUN for parent in path.parents[:2] if (parent / RUN).is_file()), None)
    run: dict[str, Any] = {}
    if file is not None:
        try:
            run = json.loads(file.read_text("utf-8"))
        except ValueError as error:
            raise InputError(f"{file}: damaged: {error}.") from error
    if "embed/embedding" not in about["base"]["leaves"]:
        raise InputError(
            f"{path}: the adapter belongs to another kind of model than the decoders that the "
            f"command line runs; its base has {', '.join(list(about['base']['leaves'])[:3])}, ..."
        )
    return Trained(path, about, run)


def _adapter(folder: Path) -> Path:
    for steps in (folder / CHECKPOINTS, folder):
        if (last := checkpoint.latest_step(steps)) is not None:
            return steps / str(last)
    # Orbax has a folder of that name inside of a checkpoint too.
    return folder / ADAPTER if (folder / ADAPTER / "about").is_dir() else folder
