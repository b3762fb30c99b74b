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
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lora_jax.interop import bitsandbytes
from lora_jax.interop.hf_config import config_from_hf, config_to_hf
from lora_jax.interop.tokenizer import Tokenizer
from lora_jax.interop.weights import (
    ParamPath,
    Slot,
    build_params,
    check_names,
    check_shape,
    layer_tensor,
    params_path,
    plan_params,
    slots,
)
from lora_jax.models.config import DecoderConfig
from lora_jax.models.decoder import Params
from lora_jax.quantization.formats import Format
from lora_jax.quantization.quantized import Quantized
from lora_jax.tree import leaves_by_path

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


def read_config(directory: Path) -> tuple[DecoderConfig, str | None]:
    """Reads what a model is made of, from its `config.json` alone.

    Args:
        directory: Holds `config.json`.

    Returns:
        The config; and of a checkpoint that bitsandbytes quantized to 4 bits, the dtype that its
        weights are formed in, else `None`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the architecture or its quantization is not covered.
    """
    where = directory / "config.json"
    if not where.is_file():
        raise FileNotFoundError(
            f"{where}: not found. Expected a folder with config.json and safetensors."
        )
    values = read_json(where)
    formed_in = bitsandbytes.compute_dtype_of(values, where)
    if formed_in is not None:
        del values["quantization_config"]
    return config_from_hf(values, where), formed_in


def read_pretrained(
    directory: str | Path,
    *,
    dtype: str | None = None,
    scan_layers: bool = False,
    remat: bool = False,
    quantize: Format | None = None,
    compute_dtype: str | None = None,
    mesh: Mesh | None = None,
) -> tuple[DecoderConfig, Params]:
    """Reads a model's config and weights.

    A checkpoint that bitsandbytes quantized to 4 bits is read as it is, its codes and scales
    unchanged; `lora_jax.dequantize` makes plain arrays of it.

    Args:
        directory: Holds `config.json` and `model.safetensors`, or shards with an index.
        dtype: Of the parameters returned, and what quantized ones stand for: float32, bfloat16 or
            float16. By default float32, or what the 4-bit weights of a checkpoint were before.
        scan_layers: Whether to stack the layers' parameters.
        remat: Whether the model recomputes activations.
        quantize: Quantizes every kernel but the head's while it is read, so that besides the
            result only one tensor is in memory.
        compute_dtype: Dtype that quantized weights are formed in. By default bfloat16, or what
            the `config.json` of a 4-bit checkpoint says.
        mesh: Devices to split the parameters over; by default all on one. Every host reads the
            files, and keeps its devices' parts.

    Returns:
        The config and the parameters.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the architecture or its quantization is not covered, a tensor is missing,
            left over or of the wrong shape, or a file is damaged; with `quantize`, if a kernel
            holds a NaN or an infinity, or is quantized already.
    """
    directory = Path(directory)
    where = directory / "config.json"
    config, formed_in = read_config(directory)
    files, listing = _weight_files(directory)
    home: dict[str, tuple[Path, Any]] = {}
    for file in files:
        reader = _open(file)
        for name in reader.keys():  # noqa: SIM118 (not a dict)
            if name in home:
                raise ValueError(
                    f"{file}: tensor {name} is also in {home[name][0].name}; expected each once."
                )
            home[name] = file, reader

    expected = slots(config, tensor_name)
    # Positions of old Llama files, which the config gives too.
    found = {name for name in home if not name.endswith(".rotary_emb.inv_freq")}
    if config.tied_head and "lm_head.weight" in found:
        found.remove("lm_head.weight")
        _check_tied(home)
    packed = {}
    if formed_in is not None:
        if quantize is not None:
            raise ValueError(
                f"{where}: quantize={str(quantize)!r}: expected plain weights, got a checkpoint "
                "in 4 bits. Leave `quantize` out, or load the original weights."
            )
        packed = bitsandbytes.find(home, expected)
        dtype = dtype or _only_dtype(where, packed)
        found -= bitsandbytes.names_of(packed)
    check_names(listing, expected, found)
    config = dataclasses.replace(
        config, dtype=dtype or "float32", scan_layers=scan_layers, remat=remat
    )
    if formed_in is None:
        plan = plan_params(config, quantize, compute_dtype)
    else:
        plan = bitsandbytes.plan_params(config, expected, packed, compute_dtype or formed_in)

    def read(name: str, slot: Slot) -> np.ndarray | Quantized:
        if name in packed:
            return bitsandbytes.read_weight(home, name, packed[name])
        file, reader = home[name]
        check_shape(file, name, slot.shape, tuple(reader.get_slice(name).get_shape()))
        return _tensor(home, name)

    where_from = {name: file for name, (file, _) in home.items()}
    return config, build_params(config, plan, expected, where_from, read, mesh)


def save_pretrained(
    directory: str | Path,
    config: DecoderConfig,
    params: Params,
    *,
    tokenizer: Tokenizer | None = None,
    max_shard_bytes: int = 2 << 30,
) -> None:
    """Writes a folder that `transformers.AutoModelForCausalLM.from_pretrained` loads.

    The folder appears complete or not at all. Quantized weights are written as bitsandbytes
    writes them, their codes and scales unchanged.

    Args:
        directory: Must not exist, or be empty.
        config: The decoder.
        params: Plain arrays or 4-bit weights, stacked or not.
        tokenizer: Written beside the weights; its end-of-text ids go into the config.
        max_shard_bytes: Weights above this many bytes are split into several files.

    Raises:
        FileExistsError: If the directory holds something.
        OSError: If there is no room for it on disk.
        ValueError: If a parameter is missing or of another shape than the config says, no
            Hugging Face architecture has these options, or bitsandbytes has no such quantized
            weights: 8-bit ones, and those padded to whole blocks.
    """
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(
            f"{directory}: expected a new or empty directory, got one that holds files. Choose "
            "another, or remove it first."
        )
    values = config_to_hf(config)
    expected = slots(config, tensor_name)
    leaves = leaves_by_path(params)
    plain = [
        name
        for name, slot in expected.items()
        if slot.is_kernel
        and not isinstance(leaves.get("/".join(params_path(config, slot.path))), Quantized)
    ]
    plain += ["lm_head.weight"] * config.tied_head
    quantization = bitsandbytes.quantization_config(params, plain)
    if quantization is not None:
        values["quantization_config"] = quantization
    size = sum(leaf.nbytes for leaf in leaves.values())
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
        tensors = _file_tensors(config, params, name, slot)
        nbytes = sum(array.nbytes for array in tensors.values())
        if sizes[-1] and sizes[-1] + nbytes > max_shard_bytes:
            shards.append([])
            sizes.append(0)
        shards[-1].append(name)
        sizes[-1] += nbytes
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = (
            SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        )
        tensors = {}
        for name in names:
            tensors |= _file_tensors(config, params, name, expected[name])
        weight_map |= dict.fromkeys(tensors, file)
        tensors = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
        save_file(tensors, target / file, metadata={"format": "pt"})
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
        (target / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _file_tensors(config, params, name: str, slot: Slot) -> dict[str, np.ndarray]:
    """What the file holds for one parameter: one array, or the parts of a 4-bit weight."""
    array = layer_tensor(config, params, slot.path)
    shape = array.shape[::-1] if slot.is_kernel else array.shape
    if shape != slot.shape:
        raise ValueError(
            f"params: {'/'.join(slot.path)}: expected {list(slot.shape)} (out, in) from the "
            f"config, got {list(shape)}."
        )
    if isinstance(array, Quantized):
        return bitsandbytes.tensors_of(name, array)
    return {name: array.T if slot.is_kernel else array}


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


def _tensor(home: bitsandbytes.Home, name: str) -> np.ndarray:
    file, reader = home[name]
    kind = reader.get_slice(name).get_dtype()
    if kind not in ("F32", "BF16", "F16"):
        raise ValueError(
            f"{file}: tensor {name}: expected dtype F32, BF16 or F16, got {kind}. Use weights "
            "that are not quantized, or that bitsandbytes quantized to 4 bits."
        )
    return reader.get_tensor(name)


def _only_dtype(where: Path, packed: dict[str, bitsandbytes.Stored]) -> str:
    """What all 4-bit weights were before."""
    dtypes = sorted({stored.dtype for stored in packed.values()})
    if len(dtypes) > 1:
        raise ValueError(
            f"{where.parent}: expected 4-bit weights made from one dtype, got "
            f"{' and '.join(dtypes)}. Say which the parameters shall have: dtype={dtypes[0]!r}."
        )
    return dtypes[0]


def _check_tied(home: bitsandbytes.Home) -> None:
    """A tied model's file may hold the head again, but only the same one."""
    if "model.embed_tokens.weight" not in home:
        return
    head, embed = _tensor(home, "lm_head.weight"), _tensor(home, "model.embed_tokens.weight")
    if not np.array_equal(head, embed):
        raise ValueError(
            f"{home['lm_head.weight'][0]}: tensor lm_head.weight: expected the embedding's "
            "values, since config.json says tie_word_embeddings, got others. Set "
            "tie_word_embeddings to false in config.json if the head is its own."
        )
