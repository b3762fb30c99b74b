"""One way to load a model, whatever it comes as."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from lora_jax.interop import assets
from lora_jax.interop.gguf import read_gguf, read_gguf_config
from lora_jax.interop.huggingface import read_config, read_pretrained
from lora_jax.interop.tokenizer import Tokenizer, read_tokenizer
from lora_jax.models.config import DecoderConfig
from lora_jax.models.decoder import Params
from lora_jax.quantization.formats import Format

SMOLLM2 = "smollm2-135m-instruct"
_HUB_FILES = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model ready for use.

    Attributes:
        config: Of the decoder.
        params: Its parameters, as of `models.decoder.init_params`.
        tokenizer: Its tokenizer.
        name: What it was asked for by.
    """

    config: DecoderConfig
    params: Params
    tokenizer: Tokenizer
    name: str


def load_pretrained(
    source: str | Path,
    *,
    dtype: str | None = None,
    scan_layers: bool = False,
    remat: bool = False,
    quantize: Format | None = None,
    compute_dtype: str | None = None,
    mesh: Mesh | None = None,
) -> Pretrained:
    """Loads a model's config, weights and tokenizer.

    Args:
        source: A folder in Hugging Face's layout, a `.gguf` file, the built-in name
            `smollm2-135m-instruct` (fetched once, 90 MB), or a hub id such as
            `HuggingFaceTB/SmolLM2-135M-Instruct`. What exists on disk comes first.
        dtype: Of the parameters: float32, bfloat16 or float16. By default float32, or what the
            4-bit weights of a checkpoint were before.
        scan_layers: Whether to stack the layers' parameters and scan over them.
        remat: Whether to recompute activations in the backward pass.
        quantize: Quantizes every kernel but the head's while it is read, so that besides the
            result only one tensor is in memory. A folder that bitsandbytes quantized to 4 bits
            is read as it is, without it.
        compute_dtype: Dtype that quantized weights are formed in. By default bfloat16, or what
            the `config.json` of a 4-bit checkpoint says.
        mesh: Devices to split the parameters over; by default all on one. Every host reads the
            files, and keeps its devices' parts.

    Returns:
        The model.

    Raises:
        FileNotFoundError: If the source is none of these, or a file is missing.
        ConnectionError: If the hub cannot be reached, or does not have the model.
        ValueError: If the model is not covered, or a file is damaged; with `quantize`, if a
            kernel holds a NaN or an infinity, or is quantized already.
    """
    name, path = str(source), _located(source, _HUB_FILES)
    options: Any = {
        "scan_layers": scan_layers,
        "remat": remat,
        "quantize": quantize,
        "compute_dtype": compute_dtype,
        "mesh": mesh,
    }
    if path.is_dir():
        tokenizer = read_tokenizer(path)
        config, params = read_pretrained(path, dtype=dtype, **options)
    else:
        config, params, tokenizer = read_gguf(path, dtype=dtype or "float32", **options)
    return Pretrained(config=config, params=params, tokenizer=tokenizer, name=name)


def load_config(source: str | Path) -> DecoderConfig:
    """Reads what a model is made of, without its weights; of the hub, only `config.json`.

    Args:
        source: As of `load_pretrained`.

    Returns:
        The config, in float32 and with unrolled layers.

    Raises:
        FileNotFoundError: If the source is none of these, or a file is missing.
        ConnectionError: If the hub cannot be reached, or does not have the model.
        ValueError: If the model is not covered, or a file is damaged.
    """
    path = _located(source, ("config.json",))
    return read_config(path)[0] if path.is_dir() else read_gguf_config(path)


def _located(source: str | Path, hub_files: tuple[str, ...]) -> Path:
    """The folder or the GGUF file that a source means; fetched if it is elsewhere."""
    name, path = str(source), Path(source)
    if not path.exists() and name == SMOLLM2:
        path = assets.smollm2()
    elif not path.exists() and path.suffix != ".gguf" and re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        path = _from_hub(name, hub_files)
    if path.is_file() and path.suffix != ".gguf":
        raise ValueError(
            f"{path}: expected a .gguf file or a folder with config.json and safetensors, got a "
            "file of another kind. Pass the folder that it lies in."
        )
    if not path.exists():
        raise FileNotFoundError(
            f"{name}: no such file or folder. Expected a folder in Hugging Face's layout, a "
            f".gguf file, a hub id such as org/name, or {SMOLLM2!r}."
        )
    return path


def _from_hub(name: str, files: tuple[str, ...]) -> Path:
    # Slow to import, and only needed here.
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(files)))
    except Exception as error:  # the hub's client raises many kinds, by the transport
        raise ConnectionError(
            f"{name}: no such folder here, and the Hugging Face hub did not give it "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}). "
            "Check the name and the network; or download it where there is one (hf download "
            f"{name} --local-dir FOLDER), and pass the folder, or a .gguf file."
        ) from error
