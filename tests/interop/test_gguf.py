"""GGUF files written from torch models with gguf's own writer, read back here."""

import dataclasses
import functools

import gguf
import jax
import numpy as np
import pytest
from gguf_files import USER, permute, vocabulary, write
from hf_models import LLAMA3, logits, make, tokens

from lora_jax.interop import assets
from lora_jax.interop.gguf import read_gguf, unpermute
from lora_jax.interop.hf_config import config_from_hf
from lora_jax.interop.pretrained import SMOLLM2, load_pretrained
from lora_jax.models import decoder


@functools.cache
def tiny(case):
    model = make(case)
    return config_from_hf(model.config.to_dict(), "config.json"), model


def run(config, params, ids):
    return jax.jit(functools.partial(decoder.apply, config))(params, ids)


@pytest.mark.parametrize(
    "case", ["llama", "llama tied", "llama scaled rope", "mistral", "qwen2", "qwen3"]
)
def test_logits_equal_torch(case, tmp_path):
    config, model = tiny(case)
    path = write(tmp_path / "model.gguf", config, model)
    got, params, _ = read_gguf(path)
    assert got == config
    expected = logits(model, tokens())
    np.testing.assert_allclose(run(got, params, tokens()), expected, rtol=1e-4, atol=1e-4)
    got, params, _ = read_gguf(path, scan_layers=True, dtype="bfloat16")
    assert got == dataclasses.replace(config, scan_layers=True, dtype="bfloat16")
    stacked = params["layers"]["attention"]["q_proj"]["kernel"]
    second = model.model.layers[1].self_attn.q_proj.weight.detach().numpy().T
    np.testing.assert_allclose(np.asarray(stacked[1], np.float32), second, rtol=2**-8)


def test_unpermute_undoes_permute():
    weight = np.random.default_rng(0).normal(size=(24, 5))
    assert not np.array_equal(permute(weight, 3), weight)
    np.testing.assert_array_equal(unpermute(permute(weight, 3), 8), weight)


def test_quantized_tensors(tmp_path):
    config, model = tiny("llama")
    kind = gguf.GGMLQuantizationType.Q8_0
    _, params, _ = read_gguf(write(tmp_path / "q.gguf", config, model, quantize=kind))
    for name in ("q_proj", "v_proj"):
        exact = getattr(model.model.layers[0].self_attn, name).weight.detach().numpy().T
        got = params["layers"]["0"]["attention"][name]["kernel"]
        # Q8_0 rounds to 1 / 127 of the largest of 32 neighbours.
        error = np.abs(got - exact).max()
        assert 0 < error <= np.abs(exact).max() / 127


def test_metadata_that_may_be_missing(tmp_path):
    config, model = tiny("llama")
    skip = ("attention.key_length", "attention.value_length", "rope.dimension_count")
    assert read_gguf(write(tmp_path / "a.gguf", config, model, skip=skip))[0] == config


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.rope.scaling.type": "yarn"}, r"rope.scaling.type='yarn' is not covered"),
        ({"llama.attention.sliding_window": 8}, r"sliding_window=8 is not covered; expected 0"),
        ({"llama.expert_count": 4}, r"expert_count=4 is not covered"),
    ],
)
def test_options_that_are_not_covered(metadata, message, tmp_path):
    path = write(tmp_path / "a.gguf", *tiny("llama"), metadata=metadata)
    with pytest.raises(ValueError, match=message) as error:
        read_gguf(path)
    assert str(path) in str(error.value)


def test_architecture_that_is_not_covered(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "gpt2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"expected one of llama, qwen2, qwen3 .* got 'gpt2'"):
        read_gguf(tmp_path / "a.gguf")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("blk.1.attn_q.weight"), r"missing \(1\): blk.1.attn_q.weight"),
        (
            lambda t: t.update({"blk.1.attn_q.bias": np.zeros(32, np.float32)}),
            r"left over \(1\): blk.1.attn_q.bias",
        ),
        (
            lambda t: t.update({"output_norm.weight": np.ones(64, np.float32)}),
            r"output_norm.weight: expected shape \[32\] from the config, got \[64\]",
        ),
        (lambda t: t.pop("token_embd.weight"), r"token_embd.weight is missing"),
        (
            lambda t: t.update({"rope_freqs.weight": np.arange(1, 5, dtype=np.float32)}),
            r"rope_freqs.weight: expected the factors of Llama 3's scaling .* got 1 to 4",
        ),
    ],
)
def test_tensors_that_do_not_fit(edit, message, tmp_path):
    path = write(tmp_path / "a.gguf", *tiny("llama"), edit=edit)
    with pytest.raises(ValueError, match=message) as error:
        read_gguf(path)
    assert str(path) in str(error.value)


def test_factors_of_one_are_no_scaling(tmp_path):
    config, model = tiny("llama")
    ones = {"rope_freqs.weight": np.ones(4, np.float32)}
    path = write(tmp_path / "a.gguf", config, model, edit=lambda t: t.update(ones))
    assert read_gguf(path)[0] == config
    assert tiny("llama scaled rope")[0].rope_scaling.factor == LLAMA3["factor"]


@pytest.mark.parametrize("keep", [0, 3, 40, 2000, 40_000, -1])
def test_truncated_file(keep, tmp_path):
    path = write(tmp_path / "a.gguf", *tiny("llama"))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"damaged or truncated one of .* bytes") as error:
        read_gguf(path)
    assert str(path) in str(error.value)


def test_other_file(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"no weights in here" * 100)
    with pytest.raises(ValueError, match=r"damaged .*magic invalid"):
        read_gguf(tmp_path / "a.gguf")
    with pytest.raises(FileNotFoundError, match=r"b\.gguf: not found"):
        read_gguf(tmp_path / "b.gguf")


def encode(path, text):
    tokenizer = read_gguf(path)[2]
    names = vocabulary()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, skip_special=False).removeprefix("<|end|>") == text
    return [names[i] for i in ids]


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        ("smollm", "hello hello", ["hello", "Ġhello"]),
        ("smollm", "1234 hello", ["1", "2", "3", "4", "Ġhello"]),
        ("smollm", "he's", ["he", "'", "s"]),
        ("smollm", "<|im_start|>hello<|im_end|>\n", ["<|im_start|>", "hello", "<|im_end|>", "Ċ"]),
        ("smollm", f"hello{USER} hello", ["hello", USER, "Ġhello"]),
        ("smollm", "ï", ["Ã", "¯"]),
        ("qwen2", "1234", ["1", "2", "3", "4"]),
        ("llama-bpe", "1234", ["<|end|>", "123", "4"]),
        ("llama-bpe", "he 12", ["<|end|>", "he", "Ġ", "12"]),
        ("llama-bpe", "  hello", ["<|end|>", "Ġ", "Ġhello"]),
    ],
)
def test_tokenizer(pre, text, expected, tmp_path):
    assert encode(write(tmp_path / "a.gguf", *tiny("llama"), pre=pre), text) == expected


def test_tokenizer_special_ids(tmp_path):
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    path = write(
        tmp_path / "a.gguf",
        *tiny("llama"),
        pre="llama-bpe",
        metadata={
            "tokenizer.ggml.eot_token_id": 1,
            "tokenizer.ggml.padding_token_id": 0,
            "tokenizer.chat_template": template,
        },
    )
    tokenizer = read_gguf(path)[2]
    assert (tokenizer.eos_ids, tokenizer.bos_id, tokenizer.pad_id) == ((1, 2), 0, 0)
    assert tokenizer.render_chat([{"role": "user", "content": "he"}]) == "<|end|>he"
    assert tokenizer.encode("he", add_special=False) == [vocabulary().index("he")]
    # Qwen2 composes i and a diaeresis to one character first.
    path = write(tmp_path / "b.gguf", *tiny("llama"), pre="qwen2")
    tokenizer = read_gguf(path)[2]
    assert tokenizer.encode("i\u0308") == tokenizer.encode("ï") != []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pre": "deepseek-llm"}, r"pre one of smollm, llama-bpe, qwen2; got 'gpt2' with 'dee"),
        ({"metadata": {"tokenizer.ggml.padding_token_id": 9999}}, r"padding_token_id: .* 9999"),
    ],
)
def test_tokenizer_that_is_not_covered(options, message, tmp_path):
    path = write(tmp_path / "a.gguf", *tiny("llama"), **options)
    with pytest.raises(ValueError, match=message):
        read_gguf(path)


@pytest.fixture(scope="module")
def smollm2():
    try:
        assets.smollm2()
    except assets.AssetError as error:
        pytest.skip(f"the model cannot be fetched here: {error}")
    return load_pretrained(SMOLLM2)


def test_smollm2(smollm2):
    config, tokenizer = smollm2.config, smollm2.tokenizer
    assert (config.num_layers, config.hidden_size, config.vocab_size) == (30, 576, 49152)
    ids = tokenizer.encode("The capital of France is")
    assert ids == [504, 3575, 282, 4649, 314]
    logits = run(config, smollm2.params, np.array([ids]))
    assert tokenizer.decode([int(logits[0, -1].argmax())]) == " Paris"
    assert tokenizer.decode(tokenizer.encode("a 2024 naïve 日本\n")) == "a 2024 naïve 日本\n"
    # Individual digits, one id each.
    digits = tokenizer.encode("0123456789")
    assert len(digits) == len(set(digits)) == 10
    chat = tokenizer.render_chat([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.encode(chat)[-4:] == [1, *tokenizer.encode("assistant\n")]
    assert tokenizer.eos_ids == (tokenizer.encode("<|im_end|>")[0],) == (2,)
