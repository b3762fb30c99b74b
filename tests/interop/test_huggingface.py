"""Weights of transformers read here, and weights written here read by transformers."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
import torch
import transformers
from hf_models import CASES, LLAMA3, logits, make, tokens
from safetensors.numpy import load_file, save_file

from lora_jax.interop import huggingface
from lora_jax.interop.huggingface import read_pretrained, save_pretrained
from lora_jax.models import decoder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Returns a function: case -> (model, folder, its logits), each made once."""

    @functools.cache
    def save(case, shards=False):
        model = make(case)
        folder = tmp_path_factory.mktemp("model")
        size = {"max_shard_size": "40KB"} if shards else {}
        model.save_pretrained(folder, **size)
        return model, folder, logits(model, tokens())

    return save


def close(got, expected):
    # Relative to the largest logit, which is of the order of 10.
    assert np.std(expected) > 0.5
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def run(config, params, ids):
    return jax.jit(functools.partial(decoder.apply, config))(params, ids)


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(saved, case):
    _, folder, expected = saved(case)
    config, params = read_pretrained(folder)
    close(run(config, params, tokens()), expected)
    config, params = read_pretrained(folder, scan_layers=True, remat=True)
    assert config.scan_layers
    assert config.remat
    close(run(config, params, tokens()), expected)


@pytest.mark.parametrize("case", ["llama", "qwen3"])
def test_shards(saved, case):
    _, folder, expected = saved(case, shards=True)
    assert len(list(folder.glob("*.safetensors"))) > 1
    close(run(*read_pretrained(folder), tokens()), expected)


@pytest.mark.parametrize("case", CASES)
def test_round_trip_through_transformers(saved, case, tmp_path):
    _, folder, expected = saved(case)
    scan = case in ("llama", "qwen2")
    config, params = read_pretrained(folder, scan_layers=scan)
    limit = 40_000 if case == "llama" else 2 << 30
    save_pretrained(tmp_path / "out", config, params, max_shard_bytes=limit)
    assert (len(list((tmp_path / "out").glob("*.safetensors"))) > 1) == (case == "llama")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    close(logits(back.eval(), tokens()), expected)
    assert read_pretrained(tmp_path / "out", scan_layers=scan)[0] == config
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_half_precision_is_kept(saved, tmp_path):
    model, _, _ = saved("llama")
    exact = model.lm_head.weight.detach().to(torch.bfloat16)
    make("llama").to(torch.bfloat16).save_pretrained(tmp_path / "half")
    config, params = read_pretrained(tmp_path / "half", dtype="bfloat16")
    np.testing.assert_array_equal(
        np.asarray(params["lm_head"]["kernel"], np.float32), exact.float().numpy().T
    )
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}
    save_pretrained(tmp_path / "again", config, params)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert back.dtype == torch.bfloat16
    assert torch.equal(back.lm_head.weight, exact)
    _, params = read_pretrained(tmp_path / "half")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}


@pytest.mark.parametrize("case", ["llama", "llama scaled rope", "qwen2 window"])
def test_config_of_transformers_4(saved, case, tmp_path):
    _, folder, _ = saved(case)
    path = copy(folder, tmp_path) / "config.json"
    values = json.loads(path.read_text())
    rope = values.pop("rope_parameters")
    values["rope_theta"] = rope.pop("rope_theta")
    values["rope_scaling"] = rope if "scaled" in case else None
    values.pop("layer_types", None)
    path.write_text(json.dumps(values))
    assert read_pretrained(path.parent)[0] == read_pretrained(folder)[0]


def copy(folder, target):
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of the plain model, to be spoilt."""
    return copy(saved("llama")[1], tmp_path)


def edit_config(folder, **changes):
    path = folder / "config.json"
    values = json.loads(path.read_text())
    values.update(changes)
    path.write_text(json.dumps(values))


def edit_weights(folder, edit):
    path = folder / "model.safetensors"
    tensors = dict(load_file(path))
    edit(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "expected one of llama, mistral, qwen2, qwen3, got 'gpt2'"),
        ({"attention_bias": True}, "attention_bias=True is not covered"),
        ({"mlp_bias": True}, "mlp_bias=True is not covered"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not covered; expected 'silu'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not covered"),
        ({"num_local_experts": 8}, "num_local_experts=8 is not covered"),
        ({"quantization_config": {"bits": 4}}, "quantization_config=.* is not covered"),
        ({"sliding_window": 8}, "sliding_window=8 is not covered for model_type 'llama'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "'yarn' is not covered"),
        (
            {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}},
            "'linear' is not covered; expected 'default' or 'llama3'",
        ),
        (
            {"rope_parameters": {**LLAMA3, "low_freq_factor": None}},
            "missing: low_freq_factor",
        ),
        ({"rope_parameters": {**LLAMA3, "partial_rotary_factor": 0.5}}, "0.5 is not covered"),
        ({"hidden_size": "32"}, "hidden_size: expected an integer, got '32'"),
        ({"num_key_value_heads": 3}, "config.json: DecoderConfig.num_heads: expected a multiple"),
        (
            {
                "model_type": "qwen3",
                "layer_types": ["sliding_attention", "full_attention"],
                "sliding_window": 4,
            },
            "layer_types: expected 2 entries, 'full_attention' first",
        ),
    ],
)
def test_options_that_are_not_covered(folder, changes, message):
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=message) as error:
        read_pretrained(folder)
    assert str(folder / "config.json") in str(error.value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"missing \(1\): model.norm.weight\n.*Check"),
        (
            lambda t: t.update({"model.layers.0.mlp.gate_proj.bias": np.zeros(64, np.float32)}),
            r"left over \(1\): model.layers.0.mlp.gate_proj.bias\n",
        ),
        (
            lambda t: t.update({"lm_head.weight": np.zeros((98, 32), np.float32)}),
            r"lm_head.weight: expected shape \[99, 32\] from the config, got \[98, 32\]",
        ),
        (
            lambda t: t.update({"lm_head.weight": np.zeros((99, 32), np.int8)}),
            r"tensor lm_head.weight: expected dtype F32, BF16 or F16, got I8",
        ),
    ],
)
def test_tensors_that_do_not_fit(folder, edit, message):
    edit_weights(folder, edit)
    with pytest.raises(ValueError, match=message) as error:
        read_pretrained(folder)
    assert str(folder / "model.safetensors") in str(error.value)


def test_tensors_that_are_known_to_be_redundant(folder):
    expected = read_pretrained(folder)[1]
    inverse = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    edit_weights(folder, lambda t: t.update(inverse))
    jax.tree.map(np.testing.assert_array_equal, read_pretrained(folder)[1], expected)
    # A tied model may hold its head again, but not another one.
    edit_config(folder, tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"lm_head.weight: expected the embedding's values"):
        read_pretrained(folder)
    edit_weights(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    assert "lm_head" not in read_pretrained(folder)[1]


@pytest.mark.parametrize("keep", [4, 2000, -1])
def test_truncated_file(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"damaged or truncated one of .* bytes") as error:
        read_pretrained(folder)
    assert str(path) in str(error.value)


def test_missing_files(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config.json: not found"):
        read_pretrained(tmp_path / "nowhere")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected model.safetensors or .* neither"):
        read_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"got only pytorch_model.bin: a pickle can run any code"):
        read_pretrained(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json: expected JSON"):
        read_pretrained(folder)


def test_bad_index(saved, tmp_path):
    folder = copy(saved("llama", shards=True)[1], tmp_path)
    path = folder / huggingface.INDEX
    index = json.loads(path.read_text())
    names = sorted(set(index["weight_map"].values()))
    name = "model.norm.weight"
    for bad in ("../model.safetensors", "/etc/model.safetensors", "..\\a.safetensors", "a.bin"):
        path.write_text(json.dumps({"weight_map": {**index["weight_map"], name: bad}}))
        with pytest.raises(ValueError, match=r"expected a \.safetensors file in the same folder"):
            read_pretrained(folder)
    path.write_text(json.dumps({"weight_map": {}}))
    with pytest.raises(ValueError, match=r"weight_map: expected tensor names and files"):
        read_pretrained(folder)
    path.write_text(json.dumps(index))
    (folder / names[0]).rename(folder / "aside")
    with pytest.raises(FileNotFoundError, match=f"{names[0]}: not found, but .* names it"):
        read_pretrained(folder)
    (folder / names[0]).write_bytes((folder / names[1]).read_bytes())
    with pytest.raises(ValueError, match=r"is also in .*; expected each once"):
        read_pretrained(folder)


def test_save_refuses(saved, tmp_path, monkeypatch):
    config, params = read_pretrained(saved("llama")[1])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "keep").write_text("")
    with pytest.raises(FileExistsError, match=r"expected a new or empty directory"):
        save_pretrained(tmp_path / "full", config, params)
    spoilt = {**params, "norm": {"scale": np.ones(31, np.float32)}}
    with pytest.raises(ValueError, match=r"norm/scale: expected \[32\] .* got \[31\]"):
        save_pretrained(tmp_path / "new", config, spoilt)
    usage = huggingface.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(huggingface.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OSError, match=r"no room: expected 0 MB, got 0 MB free"):
        save_pretrained(tmp_path / "new", config, params)
    # Nothing is left behind.
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_save_refuses_what_no_architecture_has(saved, tmp_path):
    config, params = read_pretrained(saved("qwen2")[1])
    with pytest.raises(ValueError, match=r"qkv_bias .* or qk_norm"):
        save_pretrained(tmp_path / "a", dataclasses.replace(config, qk_norm=True), params)
    config = dataclasses.replace(config, qkv_bias=False, sliding_window=4, first_sliding_layer=1)
    with pytest.raises(ValueError, match=r"first_sliding_layer=0, got 1"):
        save_pretrained(tmp_path / "a", config, params)
