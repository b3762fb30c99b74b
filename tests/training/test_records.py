"""Reading JSON Lines: the three forms, and every bad line with file, line number and reason."""

import json

import pytest

from lora_jax.training.records import Chat, Completion, DataError, Message, Text, read_jsonl

GOOD = '{"text": "fine"}'


def user(content="hi"):
    return {"role": "user", "content": content}


def assistant(content="hello"):
    return {"role": "assistant", "content": content}


def test_reads_the_three_forms(tmp_path):
    path = tmp_path / "data.jsonl"
    chat = {"messages": [{"role": "system", "content": "s"}, user("é\u2028"), assistant("b")]}
    lines = [
        json.dumps(chat, ensure_ascii=False),
        "",
        '{"prompt": "2+2=", "completion": "4"}',
        '{"text": "t"}\r',
    ]
    path.write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode("utf-8"))
    messages = (Message("system", "s"), Message("user", "é\u2028"), Message("assistant", "b"))
    assert read_jsonl(path) == [
        Chat(messages, f"{path}:1"),
        Completion("2+2=", "4", f"{path}:3"),
        Text("t", f"{path}:4"),
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{not json", "not JSON"),
        ('{"text": "a"} {"text": "b"}', "not JSON"),
        ("[" * 100_000, "not JSON"),
        (b'{"text": "\xff"}', "not UTF-8"),
        ('["text"]', "expected an object {...}, got a list"),
        ("null", "expected an object {...}, got null"),
        ("3", "expected an object {...}, got a number"),
        ("{}", "the keys are []; expected exactly"),
        ('{"txt": "a"}', "the keys are ['txt']; expected exactly"),
        ('{"text": "a", "id": 3}', "the keys are ['id', 'text']"),
        ('{"text": "a", "prompt": "b", "completion": "c"}', "['completion', 'prompt', 'text']"),
        ('{"prompt": "a"}', "the keys are ['prompt']"),
        ('{"prompt": "a", "completion": ""}', '"completion" is empty'),
        ('{"prompt": "a", "completion": " \\n"}', '"completion" is empty'),
        ('{"prompt": "", "completion": "a"}', '"prompt" is empty'),
        ('{"prompt": 3, "completion": "a"}', '"prompt" must be a string, got a number'),
        ('{"text": true}', '"text" must be a string, got a boolean'),
        ('{"text": ""}', '"text" is empty'),
        ('{"text": "\\ud800"}', '"text" has half of a surrogate pair'),
        ('{"messages": []}', '"messages" must be a list of messages, got an empty list'),
        ('{"messages": "hi"}', '"messages" must be a list of messages, got a string'),
        ({"messages": ["hi", assistant()]}, "messages[0] must be an object, got a string"),
        ({"messages": [user(), {"role": "assistant"}]}, "messages[1] has the keys ['role']"),
        ({"messages": [user() | {"name": "a"}, assistant()]}, "messages[0] has the keys"),
        ({"messages": [user() | {"role": "tool"}, assistant()]}, "the role 'tool'; expected one"),
        ({"messages": [user() | {"role": ["user"]}, assistant()]}, "the role ['user']; expected"),
        ({"messages": [user(), user() | {"role": "system"}]}, "messages[1] is a system message"),
        ({"messages": [user(), assistant("")]}, "the content of messages[1] is empty"),
        ({"messages": [user(None), assistant()]}, "content of messages[0] must be a string, got n"),
        ({"messages": [user()]}, "the last message is the user's"),
        ({"messages": [user(), assistant(), user()]}, "the last message is the user's"),
        ({"messages": [user() | {"role": "system"}]}, "the last message is the system's"),
        ({"messages": [assistant()]}, "a user message must come before the first assistant"),
    ],
)
def test_bad_line(tmp_path, line, reason):
    path = tmp_path / "data.jsonl"
    if isinstance(line, dict):
        line = json.dumps(line)
    if isinstance(line, str):
        line = line.encode()
    path.write_bytes(GOOD.encode() + b"\n\n" + line + b"\n" + GOOD.encode())
    with pytest.raises(DataError) as caught:
        read_jsonl(path)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert reason in str(caught.value)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_empty_file(tmp_path, content):
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=r"data\.jsonl: the file has no record"):
        read_jsonl(path)


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match=r"none\.jsonl: there is no such file"):
        read_jsonl(tmp_path / "none.jsonl")
