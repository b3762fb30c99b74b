"""Text to token ids and back, and chats to text."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import decoders

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A tokenizer with what a chat needs; built by `read_tokenizer` or `interop.gguf`.

    Attributes:
        backend: The tokenizer proper.
        eos_ids: Ids that end an answer; may be empty.
        bos_id: Id that begins a text, or `None`.
        pad_id: Id to fill a batch with.
        chat_template: Jinja template, or `None` when the model has no chat format.
        config: What `tokenizer_config.json` holds besides the template.
    """

    backend: tokenizers.Tokenizer
    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    pad_id: int = 0
    chat_template: str | None = None
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Returns the ids of a text.

        Args:
            text: Special tokens written out in it become their ids.
            add_special: Whether to add what the model puts around every text (Llama's
                begin-of-text). False for the result of `render_chat`, which has it already.
        """
        return self.backend.encode(text, add_special_tokens=add_special).ids

    def encode_batch(self, texts: Sequence[str], *, add_special: bool = True) -> list[list[int]]:
        """Returns `encode` of each text, computed in parallel."""
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=add_special)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Returns the text of ids, without special tokens unless they are asked for."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yields the text of ids as they come, holding back incomplete characters."""
        stream = decoders.DecodeStream(skip_special_tokens=True)
        for i in ids:
            piece = stream.step(self.backend, int(i))
            if piece:
                yield piece

    def render_chat(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = False
    ) -> str:
        """Returns a chat as the text that the model was trained on.

        Args:
            messages: Each with `role` and `content`.
            add_generation_prompt: Whether to end with the opening of the assistant's answer.

        Raises:
            ValueError: If the model has no chat template, or the template refuses the messages.
        """
        if self.chat_template is None:
            raise ValueError(
                "render_chat: this tokenizer has no chat template and no "
                f"{' and '.join(_CHATML_TOKENS)} tokens. Use plain prompts, or put a "
                "chat_template.jinja beside tokenizer.json."
            )
        # The template comes with the model, so it runs in a sandbox.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        special = {
            name: _content(self.config.get(name)) or ""
            for name in ("bos_token", "eos_token", "unk_token", "pad_token")
        }
        try:
            return environment.from_string(self.chat_template).render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                tools=None,
                **special,
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"render_chat: the model's chat template failed: {error}") from error

    def save(self, directory: str | Path) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json` into an existing folder."""
        directory = Path(directory)
        self.backend.save(str(directory / "tokenizer.json"))
        values = dict(self.config)
        values.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
        if self.chat_template is not None:
            values["chat_template"] = self.chat_template
        text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
        (directory / "tokenizer_config.json").write_text(text, "utf-8")


def make_tokenizer(
    backend: tokenizers.Tokenizer,
    *,
    config: Mapping[str, Any],
    chat_template: str | None = None,
    eos_ids: Iterable[int] = (),
) -> Tokenizer:
    """Completes a tokenizer from what is known of it.

    Args:
        backend: The tokenizer proper; padding and truncation are switched off.
        config: As in `tokenizer_config.json`; names the special tokens.
        chat_template: Jinja template; ChatML when it is `None` and the tokens for it exist.
        eos_ids: Ids that end an answer, besides the config's `eos_token`.

    Raises:
        ValueError: If the config names a token that is not in the vocabulary.
    """
    backend.no_padding()
    backend.no_truncation()

    def find(name: str) -> int | None:
        token = _content(config.get(name))
        if token is None:
            return None
        found = backend.token_to_id(token)
        if found is None:
            raise ValueError(
                f"tokenizer: {name}: expected a token of the vocabulary, got {token!r}. Check "
                "that tokenizer.json and tokenizer_config.json belong together."
            )
        return found

    ends = [*eos_ids, find("eos_token")]
    if chat_template is None and all(backend.token_to_id(t) is not None for t in _CHATML_TOKENS):
        chat_template = CHATML
        ends.append(backend.token_to_id(_CHATML_TOKENS[1]))
    eos = tuple(dict.fromkeys(end for end in ends if end is not None))
    pad = find("pad_token")
    return Tokenizer(
        backend=backend,
        eos_ids=eos,
        bos_id=find("bos_token"),
        pad_id=pad if pad is not None else (eos[0] if eos else 0),
        chat_template=chat_template,
        config={key: value for key, value in config.items() if key != "chat_template"},
    )


def read_tokenizer(directory: str | Path) -> Tokenizer:
    """Reads a tokenizer in Hugging Face's layout.

    Args:
        directory: Holds `tokenizer.json`; `tokenizer_config.json`, `chat_template.jinja`,
            `config.json` and `generation_config.json` are read where they exist.

    Raises:
        FileNotFoundError: If there is no `tokenizer.json`.
        ValueError: If a file is damaged.
    """
    directory = Path(directory)
    where = directory / "tokenizer.json"
    if not where.is_file():
        raise FileNotFoundError(
            f"{where}: not found. Expected a fast tokenizer; from an older format make one with "
            "transformers.AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)."
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(where))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{where}: damaged or of an unknown format: {error}") from error
    config = _read_optional(directory / "tokenizer_config.json")
    template = _default_template(config.get("chat_template"))
    file = directory / "chat_template.jinja"
    if file.is_file():
        template = file.read_text(encoding="utf-8")
    ends: list[int] = []
    for name in ("generation_config.json", "config.json"):
        value = _read_optional(directory / name).get("eos_token_id")
        ends += value if isinstance(value, list) else [] if value is None else [value]
    return make_tokenizer(backend, config=config, chat_template=template, eos_ids=ends)


def _read_optional(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected JSON, got {error}. Download it again.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(values).__name__}.")
    return values


def _default_template(value: Any) -> str | None:
    """A config holds one template, or several with names."""
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value}
        return named.get("default")
    return value


def _content(token: Any) -> str | None:
    """A config holds a token as its text, or as an object with its text."""
    return token.get("content") if isinstance(token, Mapping) else token


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
