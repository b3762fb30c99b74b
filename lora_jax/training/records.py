"""Training text as people write it down: JSON Lines of chats, prompts with completions, or text.

A line is one of `{"messages": [{"role": ..., "content": ...}, ...]}`,
`{"prompt": ..., "completion": ...}` and `{"text": ...}`. Reading is strict: whatever does not fit
is an error with the file, the line number and the reason, because a field that is passed over in
silence is a model trained on something else than was meant.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROLES = ("system", "user", "assistant")


class DataError(ValueError):
    """A training file that cannot be used; the message has the file, the line and the reason."""


@dataclass(frozen=True)
class Message:
    """One turn of a chat.

    Attributes:
        role: `"system"`, `"user"` or `"assistant"`.
        content: what was said.
    """

    role: str
    content: str


@dataclass(frozen=True)
class Chat:
    """A conversation; every assistant turn is learned.

    Attributes:
        messages: an optional system message, then turns of which the last is the assistant's.
        where: where it came from, such as `"train.jsonl:7"`.
    """

    messages: tuple[Message, ...]
    where: str


@dataclass(frozen=True)
class Completion:
    """Plain text in two parts, of which the second is learned; no chat template is put around it.

    Attributes:
        prompt: what is given.
        completion: what is learned.
        where: where it came from.
    """

    prompt: str
    completion: str
    where: str


@dataclass(frozen=True)
class Text:
    """Plain text that is learned whole.

    Attributes:
        text: the text.
        where: where it came from.
    """

    text: str
    where: str


Record = Chat | Completion | Text


def read_jsonl(path: Path | str) -> list[Record]:
    """Reads one record from each line of a UTF-8 JSON Lines file; blank lines are passed over.

    Args:
        path: the file.

    Returns:
        The records in the file's order, each with `where` = `"<path>:<line>"`.

    Raises:
        DataError: the file is missing or has no record, or a line is not UTF-8, not JSON, not an
            object, has other keys than one of the three forms, or a value of the wrong type, an
            empty text, an unknown role, or turns in an order from which nothing can be learned.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: there is no such file.")
    records: list[Record] = []
    # Read as bytes so that a broken character is reported with its line, and so that only "\n"
    # ends a line: the other line breaks of Unicode may stand inside a JSON string.
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            fields = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: not UTF-8 ({error}).") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not JSON ({error}).") from error
        records.append(parse_record(fields, where=where))
    if not records:
        raise DataError(f"{path}: the file has no record.")
    return records


def parse_record(fields: Any, *, where: str) -> Record:
    """The record that one decoded line describes.

    Args:
        fields: what `json.loads` returned for the line.
        where: put before the reason in errors and kept in the record.

    Raises:
        DataError: as `read_jsonl` says.

    Example:
        >>> parse_record({"prompt": "2 + 2 =", "completion": " 4"}, where="train.jsonl:1")
        Completion(prompt='2 + 2 =', completion=' 4', where='train.jsonl:1')
        >>> parse_record({"prompt": "2 + 2 =", "answer": " 4"}, where="train.jsonl:1")
        Traceback (most recent call last):
        ...
        lora_jax.training.records.DataError: train.jsonl:1: the keys are ['answer', 'prompt'];
        expected exactly ['prompt', 'completion'], ['messages'] or ['text'].
    """
    if not isinstance(fields, dict):
        raise DataError(f"{where}: expected an object {{...}}, got {_kind(fields)}.")
    keys = set(fields)
    if keys == {"messages"}:
        return Chat(_messages(fields["messages"], where), where)
    if keys == {"prompt", "completion"}:
        return Completion(
            _text(fields["prompt"], '"prompt"', where),
            _text(fields["completion"], '"completion"', where),
            where,
        )
    if keys == {"text"}:
        return Text(_text(fields["text"], '"text"', where), where)
    raise DataError(
        f"{where}: the keys are {sorted(keys)}; expected exactly ['prompt', 'completion'], "
        "['messages'] or ['text']."
    )


def _messages(value: Any, where: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise DataError(f'{where}: "messages" must be a list of messages, got {_kind(value)}.')
    messages = []
    for i, fields in enumerate(value):
        name = f"messages[{i}]"
        if not isinstance(fields, dict):
            raise DataError(f"{where}: {name} must be an object, got {_kind(fields)}.")
        if set(fields) != {"role", "content"}:
            raise DataError(
                f"{where}: {name} has the keys {sorted(fields)}; expected ['content', 'role']."
            )
        role = fields["role"]
        if role not in ROLES:
            raise DataError(f"{where}: {name} has the role {role!r}; expected one of {ROLES}.")
        if role == "system" and i > 0:
            raise DataError(f"{where}: {name} is a system message; only the first may be one.")
        content = _text(fields["content"], f"the content of {name}", where)
        messages.append(Message(role, content))
    if messages[-1].role != "assistant":
        raise DataError(
            f"{where}: the last message is the {messages[-1].role}'s; it must be an assistant "
            "message, since nothing is learned from what follows the last one."
        )
    first = next(message.role for message in messages if message.role != "system")
    if first != "user":
        raise DataError(f"{where}: a user message must come before the first assistant message.")
    return tuple(messages)


def _text(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: {name} must be a string, got {_kind(value)}.")
    if not value.strip():
        raise DataError(f"{where}: {name} is empty.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: {name} has half of a surrogate pair ({error}).") from error
    return value


def _kind(value: Any) -> str:
    """How JSON calls the type of `value`."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string"}
    if isinstance(value, list):
        return "an empty list" if not value else "a list"
    return names.get(type(value), "an object")
