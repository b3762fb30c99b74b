"""4-bit checkpoints: what bitsandbytes wrote read here, and what is written here read by it."""

import functools
import json

import bitsandbytes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from hf_models import logits, make, tokens
from safetensors.numpy import load_file, save_file

import lora_jax
from lora_jax.interop import huggingface
from lora_jax.interop.huggingface import read_pretrained, save_pretrained
from lora_jax.models import decoder
from lora_jax.quantization.formats import CODES, Format, dynamic_map
from lora_jax.tree import leaves_by_path

# down_proj has 512 blocks of 64: two of them have a nested scale of their own.
SIZES = {"hidden_size": 128, "intermediate_size": 256}
PROJECTIONS = {
    **{f"{name}_proj": "self_attn" for name in "qkvo"},
    **{f"{name}_proj": "mlp" for name in ("gate", "up", "down")},
}
NAMES = {
    f"layers/{index}/{part.replace('self_attn', 'attention')}/{name}/kernel": (
        f"model.layers.{index}.{part}.{name}.weight"
    )
    for index in range(2)
    for name, part in PROJECTIONS.items()
}
UP = "model.layers.1.mlp.up_proj.weight"
STATE = f"{UP}.quant_state.bitsandbytes__nf4"


@functools.cache
def model(case="llama"):
    return make(case, **SIZES)


def bits_config(format, dtype="float32"):
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": format.name,
        "bnb_4bit_use_double_quant": format.double_quant,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": None,
    }


def write(folder, format, *, case="llama", dtype=torch.float32, plain=()):
    """Writes a checkpoint with bitsandbytes' own functions.

    Returns:
        Path -> what bitsandbytes makes of the 4-bit weight, float32 (in, out).
    """
    tensors, exact = dict(model(case).state_dict()), {}
    for path, name in NAMES.items():
        if name in plain:
            continue
        codes, state = quantize_4bit(
            tensors[name].to(dtype),
            blocksize=format.block_size,
            compress_statistics=format.double_quant,
            quant_type=format.name,
        )
        tensors[name] = codes
        for part, tensor in state.as_dict(packed=True).items():
            tensors[f"{name}.{part}"] = tensor
        state.dtype = torch.float32
        exact[path] = dequantize_4bit(codes, state).numpy().T
    if case == "qwen3":
        tensors.pop("lm_head.weight")
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    values = model(case).config.to_dict()
    values["quantization_config"] = bits_config(format)
    (folder / "config.json").write_text(json.dumps(values))
    return exact


def layers_of(params, scan):
    """Unstacked path -> one layer's `Quantized`, its arrays on the host."""
    found = {}
    for path in NAMES:
        _, index, *keys = path.split("/")
        leaf = leaves_by_path(params)["/".join(["layers", *keys] if scan else path.split("/"))]
        assert isinstance(leaf, lora_jax.Quantized)
        if scan:
            take = functools.partial(lambda index, array, at: array[index], int(index))
            leaf = leaf.along_batch(0, take, None)
        found[path] = jax.tree.map(np.asarray, leaf)
    return found


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize(
    "format",
    [Format(), Format("nf4", 128, False), Format("fp4", 64, False), Format("fp4", 32)],
    ids=str,
)
def test_reads_what_bitsandbytes_wrote(tmp_path, format, scan):
    exact = write(tmp_path, format)
    stored = load_file(tmp_path / "model.safetensors")
    config, params = read_pretrained(tmp_path, scan_layers=scan)
    assert (config.scan_layers, config.dtype) == (scan, "float32")
    for path, weight in layers_of(params, scan).items():
        name = NAMES[path]
        assert (weight.format, weight.dtype) == (format, jnp.float32)
        assert weight.path == (path.replace(path[:8], "layers") if scan else path)
        np.testing.assert_array_equal(weight.codes.T.reshape(-1, 1), stored[name])
        np.testing.assert_array_equal(weight.scales.reshape(-1), stored[f"{name}.absmax"])
        assert weight.scales.dtype == stored[f"{name}.absmax"].dtype
        assert (weight.nested is not None) == format.double_quant
        if format.double_quant:
            key = f"{name}.quant_state.bitsandbytes__{format.name}"
            state = json.loads(stored[key].tobytes())
            assert weight.nested.mean == np.float32(state["nested_offset"])
            np.testing.assert_array_equal(weight.nested.absmax, stored[f"{name}.nested_absmax"])
        np.testing.assert_array_equal(weight.form("float32"), exact[path])
    np.testing.assert_array_equal(params["embed"]["embedding"], stored["model.embed_tokens.weight"])
    np.testing.assert_array_equal(params["lm_head"]["kernel"].T, stored["lm_head.weight"])


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize(
    "format",
    [Format(), Format("nf4", 128, False), Format("fp4", 64, False), Format("fp4", 32)],
    ids=str,
)
def test_bitsandbytes_reads_what_was_written(tmp_path, format, scan):
    model().save_pretrained(tmp_path / "plain")
    config, params = read_pretrained(
        tmp_path / "plain", scan_layers=scan, dtype="bfloat16", quantize=format
    )
    save_pretrained(tmp_path / "out", config, params, max_shard_bytes=60_000)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    tensors = {}
    for file in files:
        tensors |= safetensors.torch.load_file(file)
    index = json.loads((tmp_path / "out" / huggingface.INDEX).read_text())
    assert set(index["weight_map"]) == set(tensors)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    for path, weight in layers_of(params, scan).items():
        prefix = f"{NAMES[path]}."
        parts = {key[len(prefix) :]: value for key, value in tensors.items() if prefix in key}
        state = QuantState.from_dict(parts, torch.device("cpu"))
        assert (state.dtype, state.shape) == (torch.bfloat16, weight.shape[::-1])
        assert (state.quant_type, state.blocksize) == (format.name, format.block_size)
        state.dtype = torch.float32
        got = dequantize_4bit(tensors[NAMES[path]], state).numpy().T
        np.testing.assert_array_equal(got, weight.form("float32"))
    values = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    skipped = values.pop("llm_int8_skip_modules")
    assert skipped == ["lm_head"]
    assert values == {
        key: value
        for key, value in bits_config(format, "bfloat16").items()
        if key != "llm_int8_skip_modules"
    }
    # And here, the same in every bit.
    again_config, again = read_pretrained(tmp_path / "out", scan_layers=scan)
    assert again_config == config
    assert jax.tree.structure(again) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, again, params)


def run(config, params, ids):
    fn = functools.partial(decoder.apply, config)
    return jax.jit(lora_jax.lift(fn))(params, ids)


def theirs(folder, **options):
    found = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    assert isinstance(found.model.layers[0].mlp.up_proj, bitsandbytes.nn.Linear4bit)
    # In eval mode, bitsandbytes multiplies in bfloat16 on the CPUs that can.
    return found.train()


@pytest.mark.parametrize(
    ("case", "format"), [("llama", Format()), ("qwen3", Format("fp4", 64, False))]
)
def test_transformers(tmp_path, case, format):
    model(case).save_pretrained(tmp_path / "plain")
    options = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=format.name,
        bnb_4bit_use_double_quant=format.double_quant,
    )
    torch_model = theirs(tmp_path / "plain", quantization_config=options)
    expected = logits(torch_model, tokens())
    torch_model.save_pretrained(tmp_path / "theirs")
    for scan in (False, True):
        config, params = read_pretrained(tmp_path / "theirs", scan_layers=scan)
        assert layers_of(params, scan)["layers/1/mlp/up_proj/kernel"].compute_dtype == "float32"
        got = run(config, params, tokens())
        # Relative to the largest logit, which is of the order of 10; far less than what 4 bits do.
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
        exact = logits(model(case), tokens())
        assert np.abs(expected - exact).max() > 0.1
    save_pretrained(tmp_path / "ours", config, params)
    again = theirs(tmp_path / "ours")
    assert torch.equal(torch.tensor(logits(again, tokens())), torch.tensor(expected))
    state = again.state_dict()
    for name, tensor in torch_model.state_dict().items():
        if "quant_state" not in name:  # JSON, in another order
            assert torch.equal(state[name], tensor), name


def test_transformers_skips_what_is_plain(tmp_path):
    # Every weight but two, the head among them.
    model().save_pretrained(tmp_path / "plain")
    config, params = read_pretrained(tmp_path / "plain")
    fn = functools.partial(decoder.apply, config)
    plain = ("layers/0/mlp/down_proj/kernel", "layers/1/attention/q_proj/kernel")
    params = lora_jax.quantize(fn, params, tokens(), exclude=plain, compute_dtype="float32")
    save_pretrained(tmp_path / "out", config, params)
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    skipped = [NAMES[path].removesuffix(".weight") for path in plain]
    assert sorted(values["quantization_config"]["llm_int8_skip_modules"]) == skipped
    torch_model = theirs(tmp_path / "out")
    assert isinstance(torch_model.lm_head, bitsandbytes.nn.Linear4bit)
    assert type(torch_model.model.layers[0].mlp.down_proj) is torch.nn.Linear
    expected = logits(torch_model, tokens())
    np.testing.assert_allclose(run(config, params, tokens()), expected, rtol=1e-4, atol=1e-4)
    again = read_pretrained(tmp_path / "out")[1]
    assert jax.tree.structure(again) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    # A stack cannot hold both.
    with pytest.raises(ValueError, match=r"layers/attention/q_proj/kernel: layers stored in diff"):
        read_pretrained(tmp_path / "out", scan_layers=True)


def test_dtypes(tmp_path):
    write(tmp_path, Format(), dtype=torch.bfloat16)
    edit_config(tmp_path, bnb_4bit_compute_dtype="float16")
    config, params = read_pretrained(tmp_path)
    kernel = params["layers"]["0"]["mlp"]["up_proj"]["kernel"]
    assert (config.dtype, kernel.dtype, kernel.compute_dtype) == (
        "bfloat16",
        jnp.bfloat16,
        "float16",
    )
    assert params["lm_head"]["kernel"].dtype == jnp.bfloat16
    config, params = read_pretrained(tmp_path, dtype="float32", compute_dtype="bfloat16")
    kernel = params["layers"]["0"]["mlp"]["up_proj"]["kernel"]
    assert (config.dtype, kernel.dtype, kernel.compute_dtype) == (
        "float32",
        jnp.float32,
        "bfloat16",
    )
    assert params["lm_head"]["kernel"].dtype == jnp.float32
    with pytest.raises(ValueError, match=r"got a checkpoint in 4 bits. Leave `quantize` out"):
        read_pretrained(tmp_path, quantize=Format())
    edit_state(tmp_path, dtype="float16")
    with pytest.raises(ValueError, match=r"from one dtype, got bfloat16 and float16"):
        read_pretrained(tmp_path)
    assert read_pretrained(tmp_path, dtype="float16")[0].dtype == "float16"


def edit_config(folder, **changes):
    path = folder / "config.json"
    values = json.loads(path.read_text())
    values["quantization_config"] |= changes
    path.write_text(json.dumps(values))


def edit_weights(folder, edit):
    path = folder / "model.safetensors"
    tensors = dict(load_file(path))
    edit(tensors)
    save_file(tensors, path)


def encoded(text):
    return np.frombuffer(text.encode(), np.uint8)


def edit_state(folder, **changes):
    def edit(tensors):
        state = json.loads(tensors[STATE].tobytes()) | changes
        state = {field: value for field, value in state.items() if value is not None}
        tensors[STATE] = encoded(json.dumps(state))

    edit_weights(folder, edit)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"load_in_4bit": False, "load_in_8bit": True}, "8-bit checkpoints are not covered"),
        ({"bnb_4bit_quant_storage": "bfloat16"}, "bnb_4bit_quant_storage='bfloat16' is not cov"),
        ({"bnb_4bit_compute_dtype": "int8"}, "expected one of float32, bfloat16.* got 'int8'"),
        ({"quant_method": "gptq"}, "quantization_config=.* is not covered"),
    ],
)
def test_configs_that_are_not_covered(tmp_path, changes, message):
    write(tmp_path, Format())
    edit_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as error:
        read_pretrained(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (f"{UP}.absmax", None, rf"expected the parts absmax, .* missing: {UP}.absmax. .*again"),
        (f"{UP}.nested_quant_map", None, rf"missing: {UP}.nested_quant_map"),
        (f"{UP}.extra", np.zeros(1, np.uint8), r"got absmax, extra, .*; missing: none"),
        (UP, None, r"without the weight itself"),
        (STATE, None, r"one description, quant_state.bitsandbytes__nf4 or .* got absmax"),
        (
            UP,
            np.zeros((16383, 1), np.uint8),
            r"expected U8 \[16384, 1\] for a weight of shape \[256, 128\] in nf4, blocks of 64, "
            r"double, got U8 \[16383, 1\]. .* download it again",
        ),
        (UP, np.zeros((16384, 1), np.int8), r"expected U8 \[16384, 1\] .* got I8 \[16384, 1\]"),
        (f"{UP}.absmax", np.zeros(511, np.uint8), r"absmax: expected U8 \[512\] .* U8 \[511\]"),
        (f"{UP}.absmax", np.zeros(512, np.float32), r"absmax: expected U8 \[512\] .* F32 \[512\]"),
        (f"{UP}.nested_absmax", np.ones(1, np.float32), r"expected F32 \[2\] .* got F32 \[1\]"),
        (
            f"{UP}.nested_absmax",
            np.array([1, np.nan], np.float32),
            r"expected finite scales, got 1 that are NaN or infinite",
        ),
        (
            f"{UP}.quant_map",
            np.asarray(CODES["fp4"], np.float32),
            r"published values of nf4, got others: entry \d+ is .* not covered",
        ),
        (f"{UP}.nested_quant_map", dynamic_map()[::-1].copy(), r"got others: entry 0 is 1, not -0"),
        (STATE, encoded("{"), r"expected JSON, got Expecting property name"),
        (STATE, encoded("[" * 4096), r"expected JSON, got "),
        (STATE, encoded("[1]"), r"expected a JSON object, got \[1\]"),
        (STATE, encoded(" " * 5000), r"at most 4096 bytes \(U8\) of JSON, got U8 \[5000\]"),
        (STATE, np.zeros(5, np.int32), r"at most 4096 bytes \(U8\) of JSON, got I32 \[5\]"),
    ],
)
def test_damaged_weights(tmp_path, name, value, message):
    write(tmp_path, Format())
    edit_weights(tmp_path, lambda t: t.pop(name) if value is None else t.update({name: value}))
    for scan in (False, True):
        with pytest.raises(ValueError, match=message) as error:
            read_pretrained(tmp_path, scan_layers=scan)
        assert str(error.value).startswith(f"{tmp_path / 'model.safetensors'}: tensor {UP}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_type": "fp4"}, r"quant_type: expected 'nf4', got 'fp4'"),
        ({"dtype": "float64"}, r"dtype: expected 'float32' or .* got 'float64'"),
        ({"shape": [128, 256]}, r"shape: expected \[256, 128\], got \[128, 256\]"),
        ({"shape": None}, r"shape: expected \[256, 128\], got None"),
        ({"blocksize": 48}, r"block_size: expected a power of two from 32 to 4096, got 48"),
        ({"blocksize": None}, r"KeyError\('blocksize'\)"),
        ({"blocksize": 256}, r"whole blocks, got 128 inputs in blocks of 256: blocks span two row"),
        ({"nested_blocksize": 128}, r"nested_blocksize: expected 256, got 128"),
        ({"nested_dtype": "float16"}, r"nested_dtype: expected 'float32', got 'float16'"),
        ({"nested_offset": None}, r"nested_blocksize: expected None, got 256"),
        ({"nested_offset": "x"}, r"could not convert string to float"),
        ({"nested_offset": float("nan")}, r"nested_offset: expected a finite number, got nan"),
        ({"nested_offset": 10**400}, r"int too large to convert to float"),
    ],
)
def test_descriptions_that_do_not_fit(tmp_path, changes, message):
    write(tmp_path, Format())
    edit_state(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as error:
        read_pretrained(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / 'model.safetensors'}: tensor {UP}: ")


def test_other_damage(tmp_path):
    write(tmp_path, Format())
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1000])
    with pytest.raises(ValueError, match=r"damaged or truncated one of .* bytes"):
        read_pretrained(tmp_path)
    path.write_bytes(whole)
    # All parts gone but the codes.
    edit_weights(tmp_path, lambda t: [t.pop(name) for name in [*t] if f"{UP}." in name])
    with pytest.raises(ValueError, match=rf"{UP}: expected .* got nothing with the weight"):
        read_pretrained(tmp_path)
    model().save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values["quantization_config"] = bits_config(Format())
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"says load_in_4bit, so expected 4-bit weights, got none"):
        read_pretrained(tmp_path)


def test_weights_that_cannot_be_written(tmp_path):
    model().save_pretrained(tmp_path / "plain")
    config, params = read_pretrained(tmp_path / "plain")
    fn = functools.partial(decoder.apply, config)
    quantize = functools.partial(lora_jax.quantize, fn, params, tokens())
    kernel = "layers/0/mlp/up_proj/kernel"
    for small, message in [
        (quantize(format="int8", targets=kernel), rf"{kernel}: .*: it is int8, but its check"),
        (quantize(block_size=256, targets=kernel), rf"{kernel}: .* 128 inputs, no multiple"),
        (quantize(targets="embed/embedding"), r"embed/embedding: .* along axes"),
        (
            lora_jax.quantize(
                fn, quantize(targets=kernel), tokens(), targets="layers/1/*", format="fp4",
                exclude="*norm/scale",
            ),
            rf"all weights in one format, got nf4, .* at {kernel} and fp4, .* at layers/1/",
        ),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message) as error:
            save_pretrained(tmp_path / "out", config, small)
        assert "lora_jax.dequantize(params)" in str(error.value)
        assert [path.name for path in tmp_path.iterdir()] == ["plain"]
        # What it says works.
        save_pretrained(tmp_path / "out", config, lora_jax.dequantize(small))
        values = json.loads((tmp_path / "out" / "config.json").read_text())
        assert "quantization_config" not in values
        for file in (tmp_path / "out").iterdir():
            file.unlink()
        (tmp_path / "out").rmdir()
