"""Every kind of source, and those that are none."""

import huggingface_hub
import numpy as np
import pytest
import transformers
from gguf_files import write
from hf_models import logits, make, tokens

from lora_jax.interop import assets, pretrained
from lora_jax.interop.hf_config import config_from_hf
from lora_jax.interop.huggingface import save_pretrained
from lora_jax.interop.pretrained import load_pretrained
from lora_jax.models import decoder


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A GGUF file, and the folder written from it, of one torch model."""
    folder = tmp_path_factory.mktemp("sources")
    model = make("llama")
    config = config_from_hf(model.config.to_dict(), folder)
    path = write(folder / "model.gguf", config, model)
    loaded = load_pretrained(path)
    save_pretrained(folder / "out", loaded.config, loaded.params, tokenizer=loaded.tokenizer)
    return model, path, folder / "out"


def test_folder_equals_file(sources):
    model, file, folder = sources
    first, second = load_pretrained(file), load_pretrained(str(folder))
    assert first.config == second.config
    assert second.name == str(folder)
    expected = logits(model, tokens())
    for loaded in (first, second):
        got = decoder.apply(loaded.config, loaded.params, tokens())
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    text = "<|im_start|>hello 123<|im_end|>"
    assert first.tokenizer.encode(text) == second.tokenizer.encode(text)
    assert first.tokenizer.eos_ids == second.tokenizer.eos_ids == (2,)
    assert first.tokenizer.chat_template == second.tokenizer.chat_template


def test_transformers_loads_what_was_written(sources):
    _, file, folder = sources
    ours = load_pretrained(file).tokenizer
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    text = "hello<|im_end|> hello 1234"
    assert theirs(text)["input_ids"] == ours.encode(text)
    chat = [{"role": "user", "content": "hello"}]
    assert theirs.apply_chat_template(chat, tokenize=False) == ours.render_chat(chat)
    config = transformers.AutoConfig.from_pretrained(folder)
    assert (config.eos_token_id, config.bos_token_id) == ([2], 0)


def test_options(sources):
    loaded = load_pretrained(sources[2], dtype="bfloat16", scan_layers=True, remat=True)
    assert (loaded.config.dtype, loaded.config.scan_layers, loaded.config.remat) == (
        "bfloat16",
        True,
        True,
    )


def test_hub_id(sources, monkeypatch):
    asked = []

    def download(name, *, allow_patterns):
        asked.append((name, allow_patterns))
        return str(sources[2])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    loaded = load_pretrained("org/name")
    assert loaded.name == "org/name"
    ((name, patterns),) = asked
    assert name == "org/name"
    assert not any(pattern.endswith((".bin", ".pt", ".py", "*")) for pattern in patterns)


def test_hub_without_a_network(monkeypatch):
    def download(name, *, allow_patterns):
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ConnectionError, match=r"org/name: .*OSError: no route to host\)\. Check"):
        load_pretrained("org/name")


def test_built_in_name(sources, monkeypatch):
    monkeypatch.setattr(assets, "smollm2", lambda: sources[1])
    assert load_pretrained(pretrained.SMOLLM2).name == pretrained.SMOLLM2


def test_no_source(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file or folder.*'smollm2-135m-instruct'"):
        load_pretrained(tmp_path / "nothing" / "here")
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_pretrained("models/none.gguf")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"expected a \.gguf file or a folder"):
        load_pretrained(tmp_path / "model.safetensors")
