"""Weights quantized while they are read: the same as afterwards, in less memory."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf_files import write
from hf_models import make, tokens
from safetensors.numpy import load_file, save_file

import lora_jax
from lora_jax.interop.gguf import read_gguf
from lora_jax.interop.hf_config import config_from_hf, config_to_hf
from lora_jax.interop.huggingface import read_pretrained, tensor_name
from lora_jax.interop.pretrained import load_pretrained
from lora_jax.interop.weights import slots
from lora_jax.models import decoder
from lora_jax.models.config import DecoderConfig
from lora_jax.quantization.formats import Format
from lora_jax.tree import leaves_by_path

# 96 inputs are no whole number of blocks of 64; some matrices have more than 256 blocks.
SIZES = {"hidden_size": 96, "intermediate_size": 192, "head_dim": 24, "num_hidden_layers": 2}
KERNELS = {
    *(f"attention/{name}_proj/kernel" for name in "qkvo"),
    *(f"mlp/{name}_proj/kernel" for name in ("gate", "up", "down")),
}


@functools.cache
def model(case):
    return make(case, **SIZES)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Returns a function: case -> folder in Hugging Face's layout, or a GGUF file."""

    @functools.cache
    def save(case, kind):
        folder = tmp_path_factory.mktemp("model")
        if kind == "gguf":
            config = config_from_hf(model(case).config.to_dict(), folder)
            return write(folder / "model.gguf", config, model(case))
        model(case).save_pretrained(folder)
        return folder

    return save


def read(path, **options):
    """Config and params."""
    return (read_gguf if path.suffix == ".gguf" else read_pretrained)(path, **options)[:2]


def assert_same(got, expected):
    """Equal in structure, and in every bit of codes, scales and plain arrays."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert isinstance(one, jax.Array)
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize(
    ("case", "kind", "format", "dtype"),
    [
        ("llama", "folder", Format(), "float32"),
        ("qwen2", "folder", Format("fp4", 32, False), "bfloat16"),
        ("qwen3", "folder", Format("int8"), "float32"),
        ("llama", "gguf", Format(), "bfloat16"),
    ],
)
def test_equals_quantizing_afterwards(saved, case, kind, format, dtype, scan):
    path = saved(case, kind)
    config, params = read(path, dtype=dtype, scan_layers=scan)
    expected = lora_jax.quantize(
        functools.partial(decoder.apply, config),
        params,
        tokens(),
        targets="layers/*/kernel",
        format=format.name,
        block_size=format.block_size,
        double_quant=format.double_quant,
        compute_dtype="float16",
    )
    got_config, got = read(
        path, dtype=dtype, scan_layers=scan, quantize=format, compute_dtype="float16"
    )
    assert got_config == config
    assert_same(got, expected)
    found = {
        path: leaf
        for path, leaf in leaves_by_path(got).items()
        if isinstance(leaf, lora_jax.Quantized)
    }
    prefixes = ["layers"] if scan else [f"layers/{index}" for index in range(2)]
    assert set(found) == {f"{prefix}/{name}" for prefix in prefixes for name in KERNELS}
    for path, leaf in found.items():
        assert (leaf.path, leaf.dtype, leaf.format) == (path, jnp.dtype(dtype), format)


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_dense_values_are_near(saved, kind):
    # Not only equal to our own: near to torch's weights, in the right orientation.
    _, params = read(saved("llama", kind), scan_layers=True, quantize=Format())
    weight = params["layers"]["mlp"]["down_proj"]["kernel"]
    exact = model("llama").model.layers[1].mlp.down_proj.weight.detach().numpy().T
    error = np.abs(np.asarray(weight.form("float32"))[1] - exact)
    # The widest gap between NF4's codes is 0.304: at most half of it times the largest of a block.
    assert error.max() < 0.16 * np.abs(exact).max()
    assert error.mean() < 0.02


def test_load_pretrained(saved):
    # The folder's own reader wants a tokenizer, which the GGUF file has.
    path = saved("llama", "gguf")
    loaded = load_pretrained(path, dtype="bfloat16", quantize=Format(), compute_dtype="float32")
    expected = read(path, dtype="bfloat16", quantize=Format(), compute_dtype="float32")
    assert loaded.config == expected[0]
    assert_same(loaded.params, expected[1])
    loaded = load_pretrained(path, quantize=Format())
    kernel = loaded.params["layers"]["0"]["mlp"]["up_proj"]["kernel"]
    assert (kernel.compute_dtype, kernel.dtype) == ("bfloat16", jnp.float32)


@pytest.mark.parametrize("scan", [False, True])
def test_nan_is_found(saved, tmp_path, scan):
    for file in saved("llama", "folder").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    file = tmp_path / "model.safetensors"
    tensors = dict(load_file(file))
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].copy()
    tensors[name][3, 5] = np.nan
    save_file(tensors, file)
    read_pretrained(tmp_path, scan_layers=scan)
    with pytest.raises(ValueError, match=r"1 of its 18432 values are NaN, infinite") as error:
        read_pretrained(tmp_path, scan_layers=scan, quantize=Format())
    path = "layers/mlp/up_proj/kernel" if scan else "layers/1/mlp/up_proj/kernel"
    assert str(error.value).startswith(f"{file}: tensor {name}: {path}: cannot be quantized")


def test_nan_in_gguf(tmp_path):
    config = config_from_hf(model("llama").config.to_dict(), tmp_path)

    def spoil(tensors):
        tensors["blk.1.attn_q.weight"][0, 0] = np.inf

    file = write(tmp_path / "a.gguf", config, model("llama"), edit=spoil)
    with pytest.raises(ValueError, match=r"layers/1/attention/q_proj/kernel: .* infinite") as error:
        read_gguf(file, quantize=Format())
    assert str(file) in str(error.value)


# 78 MB in bfloat16. Neither the whole model nor a stack of all layers (38 MB in float32) can hide.
BIG = DecoderConfig(
    vocab_size=512, hidden_size=768, intermediate_size=2048, num_layers=6,
    num_heads=12, num_kv_heads=4, head_dim=64,
)  # fmt: skip

# Memory of files that are mapped does not count: the system takes it back at will.
MEASURE = """
import gc, json, sys, threading, time
import jax
from lora_jax.interop.huggingface import read_pretrained
from lora_jax.quantization.formats import Format

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))

def measure(folder, **options):
    gc.collect()
    before, samples, done = anonymous(), [], threading.Event()

    def sample():
        while not done.is_set():
            samples.append(anonymous())
            time.sleep(0.0005)

    thread = threading.Thread(target=sample)
    thread.start()
    params = jax.block_until_ready(read_pretrained(folder, quantize=Format(), **options)[1])
    done.set()
    thread.join()
    gc.collect()
    size = sum(array.nbytes for array in jax.tree.leaves(params))
    return {
        "peak": max(samples) - before, "end": anonymous() - before, "samples": len(samples),
        "size": size,
    }

one_layer, folder = sys.argv[1:]
# Compiles: one layer has all the shapes. It is data that counts here.
measure(one_layer)
print(json.dumps([
    measure(folder, dtype="bfloat16", scan_layers=True),
    measure(folder, dtype="float32"),
]))
"""


def save_big(folder, layers):
    folder.mkdir()
    config = dataclasses.replace(BIG, num_layers=layers)
    (folder / "config.json").write_text(json.dumps(config_to_hf(config)))
    # The layers may be alike, but not in one memory.
    values = np.random.default_rng(0).normal(size=2048 * 768).astype(jnp.bfloat16)
    tensors = {
        name: values[: int(np.prod(slot.shape))].reshape(slot.shape).copy()
        for name, slot in slots(config, tensor_name).items()
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_peak_memory(tmp_path):
    folders = save_big(tmp_path / "one", 1), save_big(tmp_path / "all", BIG.num_layers)
    assert (folders[1] / "model.safetensors").stat().st_size > 70e6
    # Freed memory goes back at once, so that only what is in use is seen.
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": str(1 << 18),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(Path(lora_jax.__file__).parents[1]), *sys.path]),
    }
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, folders)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    largest = 4 * 2048 * 768
    for found in json.loads(run.stdout):
        assert found["samples"] > 50
        # In float32 the tensor itself and, inside the encoder, its values over their scales; and
        # an eighth of that as codes. Reading holds less: the tensor, and the file's copy of it.
        # The rest is what Python and XLA need for themselves.
        assert found["peak"] < found["size"] + 2.125 * largest + (4 << 20)
        # No second copy of the model is left, nor of its largest tensor.
        assert found["end"] < found["size"] + largest
