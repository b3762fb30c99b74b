"""`lora-jax generate`: a model answers, with or without an adapter."""

from __future__ import annotations

import dataclasses
import functools
import time
from pathlib import Path
from typing import Literal

import jax
from rich.console import Console

from lora_jax.commands import trained
from lora_jax.commands.errors import InputError, reading_input
from lora_jax.interop.pretrained import SMOLLM2, load_pretrained
from lora_jax.interop.tokenizer import Tokenizer
from lora_jax.models import decoder, generation
from lora_jax.training.tasks import PromptForm
from lora_jax.transform.lift import lift
from lora_jax.tree import combine


@dataclasses.dataclass(frozen=True)
class GenerateOptions:
    """Let a model answer a prompt; the answer appears as it is written.

    Attributes:
        prompt: What to answer or continue.
        model: The base: a folder, a .gguf file, a hub id, or smollm2-135m-instruct. By default the
            one that the adapter was trained on.
        adapter: Folder of a run, or of an adapter.
        form: Put the chat template around the prompt, or not. Without an adapter as-trained is
            chat, if the model has a template.
        system: System message of the chat; by default the one that the adapter was trained with.
        max_new_tokens: Stop after this many tokens.
        temperature: 0 always takes the likeliest token; above, tokens are drawn.
        seed: Of the drawing.
        dtype: Of the base, without an adapter; with one it is what the adapter was trained with.
    """

    prompt: str
    model: str | None = None
    adapter: Path | None = None
    form: Literal["as-trained", "chat", "plain"] = "as-trained"
    system: str | None = None
    max_new_tokens: int = 128
    temperature: float = 0.0
    seed: int = 0
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


def generate(options: GenerateOptions, console: Console) -> None:
    """Runs `lora-jax generate`.

    Raises:
        InputError: the model, the adapter or the prompt cannot be used.
    """
    errors = Console(stderr=True, highlight=False)
    with reading_input():
        if options.adapter is None:
            model = load_pretrained(options.model or SMOLLM2, dtype=options.dtype, scan_layers=True)
            params = model.params
            form = PromptForm(chat=model.tokenizer.chat_template is not None)
        else:
            found = trained.find(options.adapter)
            model, adapter, _ = found.load(options.model)
            params, form = combine(model.params, adapter), found.form(model.tokenizer)
        ids = _prompt_ids(options, model.tokenizer, form)
        tokens = generation.generate(
            lift(functools.partial(decoder.apply, model.config)),
            params,
            ids,
            config=model.config,
            max_new_tokens=options.max_new_tokens,
            eos_ids=model.tokenizer.eos_ids,
            key=jax.random.key(options.seed),
            temperature=options.temperature,
        )
    started, count = time.perf_counter(), 0

    def counted():
        nonlocal started, count
        for token in tokens:
            if count == 0:
                started = time.perf_counter()
            count += 1
            yield token

    for piece in model.tokenizer.decode_stream(counted()):
        # Not through rich, which would read markup and wrap lines.
        console.file.write(piece)
        console.file.flush()
    console.file.write("\n")
    if count > 1 and errors.is_terminal:
        speed = (count - 1) / (time.perf_counter() - started)
        errors.print(f"{count} tokens, {speed:.1f} tokens/s after the first", style="dim")


def _prompt_ids(options: GenerateOptions, tokenizer: Tokenizer, form: PromptForm) -> list[int]:
    if not options.prompt:
        raise InputError("prompt: expected some text, got none.")
    if options.form != "as-trained":
        form = PromptForm(chat=options.form == "chat", system=form.system)
    text = options.prompt + form.suffix
    if not form.chat:
        if options.system is not None:
            raise InputError("system: expected none, since the prompt is not put into a chat.")
        return tokenizer.encode(text)
    system = form.system if options.system is None else options.system
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": text})
    rendered = tokenizer.render_chat(messages, add_generation_prompt=True)
    return tokenizer.encode(rendered, add_special=False)
