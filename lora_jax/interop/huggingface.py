"""Folders in Hugging Face's layout: `config.json`, safetensors, a tokenizer."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lora_jax.interop.hf_config import config_from_hf, config_to_hf
from lora_jax.interop.tokenizer import Tokenizer
from lora_jax.interop.weights import (
    ParamPath,
    build_params,
    check_names,
    check_shape,
    layer_tensor,
    slots,
)
from lora_jax.models.config import DecoderConfig
from lora_jax.models.decoder import Params

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_TOP: dict[ParamPath, str] = {
    ("embed", "embedding"): "model.embed_tokens.weight",
    ("norm", "scale"): "model.norm.weight",
    ("lm_head", "kernel"): "lm_head.weight",
}
_MODULES = {
    "attention": "self_attn",
    "input_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
}


def tensor_name(path: ParamPath) -> str:
    """Returns Hugging Face's name of a parameter.

    >>> tensor_name(("layers", "0", "attention", "q_proj", "kernel"))
    'model.layers.0.self_attn.q_proj.weight'
    """
    if path in _TOP:
        return _TOP[path]
    modules = [_MODULES.get(part, part) for part in path[2:-1]]
    leaf = "bias" if path[-1] == "bias" else "weight"
    return ".".join(["model", "layers", path[1], *modules, leaf])


def read_json(path: Path) -> dict[str, Any]:
    """Returns a JSON object.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it does not hold a JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected JSON, got {error}. Download it again.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(values).__name__}.")
    return values


def read_pretrained(
    directory: str | Path,
    *,
    dtype: str = "float32",
    scan_layers: bool = False,
    remat: bool = False,
) -> tuple[DecoderConfig, Params]:
    """Reads a model's config and weights.

    Args:
        directory: Holds `config.json` and `model.safetensors`, or shards with an index.
        dtype: Of the parameters returned: float32, bfloat16 or float16.
        scan_layers: Whether to stack the layers' parameters.
        remat: Whether the model recomputes activations.

    Returns:
        The config and the parameters.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the architecture is not covered, a tensor is missing, left over or of the
            wrong shape, or a file is damaged.
    """
    directory = Path(directory)
    where = directory / "config.json"
    if not where.is_file():
        raise FileNotFoundError(
            f"{where}: not found. Expected a folder with config.json and safetensors."
        )
    config = dataclasses.replace(
        config_from_hf(read_json(where), where),
        dtype=dtype,
        scan_layers=scan_layers,
        remat=remat,
    )
    files, listing = _weight_files(directory)
    readers, home = {}, {}
    for file in files:
        readers[file] = _open(file)
        for name in readers[file].keys():  # noqa: SIM118 (not a dict)
            if name in home:
                raise ValueError(
                    f"{file}: tensor {name} is also in {home[name].name}; expected each once."
                )
            home[name] = file

    expected = slots(config, tensor_name)
    # Positions of old Llama files, which the config gives too.
    found = {name for name in home if not name.endswith(".rotary_emb.inv_freq")}
    if config.tied_head and "lm_head.weight" in found:
        found.remove("lm_head.weight")
        _check_tied(readers, home)
    check_names(listing, expected, found)

    def read(name, slot):
        file = home[name]
        check_shape(file, name, slot.shape, tuple(readers[file].get_slice(name).get_shape()))
        return _tensor(readers[file], file, name)

    return config, build_params(config, expected, read)


def save_pretrained(
    directory: str | Path,
    config: DecoderConfig,
    params: Params,
    *,
    tokenizer: Tokenizer | None = None,
    max_shard_bytes: int = 2 << 30,
) -> None:
    """Writes a folder that `transformers.AutoModelForCausalLM.from_pretrained` loads.

    The folder appears complete or not at all.

    Args:
        directory: Must not exist, or be empty.
        config: The decoder.
        params: Plain arrays, stacked or not.
        tokenizer: Written beside the weights; its end-of-text ids go into the config.
        max_shard_bytes: Weights above this many bytes are split into several files.

    Raises:
        FileExistsError: If the directory holds something.
        OSError: If there is no room for it on disk.
        ValueError: If a parameter is missing or of another shape than the config says, or no
            Hugging Face architecture has these options.
    """
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(
            f"{directory}: expected a new or empty directory, got one that holds files. Choose "
            "another, or remove it first."
        )
    values = config_to_hf(config)
    expected = slots(config, tensor_name)
    size = sum(int(np.prod(slot.shape)) for slot in expected.values())
    size *= np.dtype(layer_tensor(config, params, ("norm", "scale")).dtype).itemsize
    directory.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(directory.parent).free
    if size > free:
        raise OSError(
            errno.ENOSPC,
            f"no room: expected {size / 1e6:.0f} MB, got {free / 1e6:.0f} MB free. Make room, "
            "or choose another disk",
            str(directory),
        )
    if tokenizer is not None:
        values["eos_token_id"] = list(tokenizer.eos_ids)
        values["bos_token_id"] = tokenizer.bos_id
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as temp:
        # Inside the private temporary folder, so that the result has ordinary permissions.
        target = Path(temp) / directory.name
        target.mkdir()
        (target / "config.json").write_text(json.dumps(values, indent=2) + "\n", "utf-8")
        if tokenizer is not None:
            tokenizer.save(target)
        _write_shards(target, config, params, expected, max_shard_bytes)
        if directory.exists():
            directory.rmdir()
        os.replace(target, directory)


def _write_shards(target: Path, config, params, expected, max_shard_bytes: int) -> None:
    shards: list[list[str]] = [[]]
    sizes = [0]
    for name, slot in expected.items():
        array = layer_tensor(config, params, slot.path)
        shape = array.shape[::-1] if slot.is_kernel else array.shape
        if shape != slot.shape:
            raise ValueError(
                f"params: {'/'.join(slot.path)}: expected {list(slot.shape)} (out, in) from the "
                f"config, got {list(shape)}."
            )
        if sizes[-1] and sizes[-1] + array.nbytes > max_shard_bytes:
            shards.append([])
            sizes.append(0)
        shards[-1].append(name)
        sizes[-1] += array.nbytes
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = (
            SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        )
        tensors = {}
        for name in names:
            array = layer_tensor(config, params, expected[name].path)
            tensors[name] = np.ascontiguousarray(array.T if expected[name].is_kernel else array)
            weight_map[name] = file
        save_file(tensors, target / file, metadata={"format": "pt"})
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
        (target / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _weight_files(directory: Path) -> tuple[list[Path], Path]:
    """Returns the files that hold the weights, and the one to name in errors about names."""
    single, index = directory / SINGLE, directory / INDEX
    if single.is_file():
        return [single], single
    if not index.is_file():
        pickles = sorted(path.name for path in directory.glob("*.bin"))
        if pickles:
            raise ValueError(
                f"{directory}: expected safetensors, got only {', '.join(pickles)}: a pickle can "
                "run any code when it is opened, so it is refused. Convert it where you trust "
                "it: transformers.AutoModelForCausalLM.from_pretrained(FOLDER)"
                ".save_pretrained(NEW_FOLDER, safe_serialization=True)."
            )
        raise FileNotFoundError(f"{directory}: expected {SINGLE} or {INDEX}, found neither.")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(
            f"{index}: weight_map: expected tensor names and files, got {weight_map!r}."
        )
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        plain = not any(mark in name for mark in ("/", "\\", ":", "\0"))
        if not plain or not name.endswith(".safetensors"):
            raise ValueError(
                f"{index}: weight_map names the file {name!r}; expected a .safetensors file in "
                "the same folder."
            )
        if not (directory / name).is_file():
            raise FileNotFoundError(
                f"{directory / name}: not found, but {INDEX} names it. Download it again."
            )
    return [directory / name for name in names], index


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file}: expected a complete safetensors file, got a damaged or truncated one of "
            f"{file.stat().st_size} bytes ({error}). Download it again."
        ) from error


def _tensor(reader: Any, file: Path, name: str) -> np.ndarray:
    kind = reader.get_slice(name).get_dtype()
    if kind not in ("F32", "BF16", "F16"):
        raise ValueError(
            f"{file}: tensor {name}: expected dtype F32, BF16 or F16, got {kind}. Use weights "
            "that are not quantized."
        )
    return reader.get_tensor(name)


def _check_tied(readers, home) -> None:
    """A tied model's file may hold the head again, but only the same one."""
    head_file, embed_file = home["lm_head.weight"], home.get("model.embed_tokens.weight")
    if embed_file is None:
        return
    head = _tensor(readers[head_file], head_file, "lm_head.weight")
    embed = _tensor(readers[embed_file], embed_file, "model.embed_tokens.weight")
    if not np.array_equal(head, embed):
        raise ValueError(
            f"{head_file}: tensor lm_head.weight: expected the embedding's values, since "
            "config.json says tie_word_embeddings, got others. Set tie_word_embeddings to false "
            "in config.json if the head is its own."
        )
