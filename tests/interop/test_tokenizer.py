"""Tokenizers in Hugging Face's layout, and chats, compared with transformers."""

import dataclasses
import json

import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers

from lora_jax.interop.tokenizer import CHATML, make_tokenizer, read_tokenizer

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "Me."},
    {"role": "user", "content": "Why?"},
]
TEMPLATE = """{%- for message in messages %}
    {%- if message.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}
    {%- if loop.first %}{{ bos_token }}{% endif %}
    [{{ message.role }}] {{ message.content | trim }}{{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}[assistant]{% endif %}"""


def backend(special=("<s>", "</s>")):
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["the cat sat on the mat. Who? Me. Be brief."] * 3, trainer)
    return made


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "made"
    path.mkdir()
    made = backend()
    made.enable_truncation(3)
    made.enable_padding()
    made.save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": {"__type": "AddedToken", "content": "<s>", "special": True},
        "eos_token": "</s>",
        "chat_template": TEMPLATE,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def test_ids_and_chats_equal_transformers(folder, tmp_path):
    ours = read_tokenizer(folder)
    (tmp_path / "out").mkdir()
    ours.save(tmp_path / "out")
    for path in (folder, tmp_path / "out"):
        theirs = transformers.AutoTokenizer.from_pretrained(path)
        for text in ("the cat sat", "<s>naïve\n 日本</s>", ""):
            assert ours.encode(text) == theirs(text)["input_ids"]
            assert ours.decode(ours.encode(text)) == theirs.decode(
                theirs(text)["input_ids"], skip_special_tokens=True
            )
        for prompt in (False, True):
            expected = theirs.apply_chat_template(
                CHAT, tokenize=False, add_generation_prompt=prompt
            )
            assert ours.render_chat(CHAT, add_generation_prompt=prompt) == expected
        assert (ours.bos_id, ours.eos_ids) == (theirs.bos_token_id, (theirs.eos_token_id,))
    again = read_tokenizer(tmp_path / "out")
    assert dataclasses.replace(again, backend=ours.backend) == ours


def test_no_text_is_cut_or_padded(folder):
    tokenizer = read_tokenizer(folder)
    text = "the cat sat on the mat. " * 20
    batch = tokenizer.encode_batch([text, "the"])
    assert tokenizer.decode(batch[0]) == text
    assert batch == [tokenizer.encode(text), tokenizer.encode("the")]
    assert len(batch[1]) < 5
    assert tokenizer.vocab_size == len(tokenizer.backend.get_vocab())


def test_stream_holds_back_incomplete_characters(folder):
    tokenizer = read_tokenizer(folder)
    text = "the 日本 cat"
    pieces = list(tokenizer.decode_stream(iter(tokenizer.encode(text))))
    assert "".join(pieces) == text
    assert len(pieces) > 3
    assert all("\ufffd" not in piece for piece in pieces)


def test_template_file_comes_first(folder):
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    assert read_tokenizer(folder).render_chat(CHAT) == "Be brief.!"


def test_named_templates(folder):
    path = folder / "tokenizer_config.json"
    named = [{"name": "tools", "template": "no"}, {"name": "default", "template": "yes"}]
    path.write_text(json.dumps({"eos_token": "</s>", "chat_template": named}))
    assert read_tokenizer(folder).render_chat(CHAT) == "yes"


def test_end_ids_come_from_every_config(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 0]}')
    (folder / "config.json").write_text('{"eos_token_id": 9}')
    assert read_tokenizer(folder).eos_ids == (7, 0, 9, 1)


def test_chatml_when_its_tokens_exist():
    made = make_tokenizer(backend(("<|im_start|>", "<|im_end|>")), config={})
    assert made.chat_template == CHATML
    assert made.eos_ids == (1,)
    assert made.render_chat(CHAT[1:2], add_generation_prompt=True) == (
        "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_no_chat_format():
    made = make_tokenizer(backend(), config={})
    with pytest.raises(ValueError, match=r"no chat template and no .*im_start.* Use plain"):
        made.render_chat(CHAT)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (TEMPLATE, "failed: no tools"),
        ("{% if %}", "failed: Expected an expression"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "failed: .*unsafe|failed: .*undefined"),
        ("{{ messages.append(1) }}", "failed: .*not safely callable|failed: .*unsafe"),
    ],
)
def test_templates_that_fail(template, message):
    made = make_tokenizer(backend(), config={}, chat_template=template)
    with pytest.raises(ValueError, match=message):
        made.render_chat([{"role": "tool", "content": "x"}])


def test_bad_folders(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json: not found"):
        read_tokenizer(tmp_path)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<none>"}')
    with pytest.raises(ValueError, match=r"eos_token: expected a token .* got '<none>'"):
        read_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: expected JSON"):
        read_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"expected a JSON object, got list"):
        read_tokenizer(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json: damaged"):
        read_tokenizer(folder)
