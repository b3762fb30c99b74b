"""The options of a fine-tuning run: each field is a flag, and `--help` shows what is said of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import optax

from lora_jax.checkpoint.layout import local
from lora_jax.config import LoraConfig
from lora_jax.interop.pretrained import SMOLLM2
from lora_jax.offloading import offload
from lora_jax.quantization.formats import FormatName
from lora_jax.training.mesh import parse_mesh

TWEETS = "tweets"


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """The base model and how it is run.

    Attributes:
        model: A folder in Hugging Face's layout, a .gguf file, a hub id, or the built-in name
            smollm2-135m-instruct, which is fetched once (90 MB).
        dtype: Of the base's parameters and of the arithmetic. The adapter is float32.
        unroll: Compile every layer apart, instead of one for all: much slower to compile. An
            adapter fits the base in the layout that it was trained in.
        remat: Recompute each layer in the backward pass: less memory, a third more time.
        quantize: Store the base's linear layers in 4 bits (nf4, fp4) or 8 (int8), as in QLoRA. It
            comes with that paper's recipe, unless you give these yourself: rank 64, alpha 16, a
            constant learning rate, clip 0.3.
    """

    model: str = SMOLLM2
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    unroll: bool = False
    remat: bool = False
    quantize: FormatName | None = None


@dataclasses.dataclass(frozen=True)
class DeviceOptions:
    """What the run is spread over. On several hosts, start the same command on each.

    Attributes:
        mesh: How the devices of all hosts are used, such as data=2,fsdp=4: `data` splits the rows
            of a batch, `fsdp` those and the weights, `tensor` heads and hidden units. Without it,
            one device is used.
        coordinator: HOST:PORT of host 0, or auto to take it and the next two from the cluster's
            environment (Cloud TPU, Kubernetes, Slurm, Open MPI).
        num_hosts: How many hosts there are.
        host_id: Which of them this one is, from 0. Host 0 prints; all must see the output folder.
    """

    mesh: str | None = None
    coordinator: str | None = None
    num_hosts: int | None = None
    host_id: int | None = None


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """What is learned, and in what batches.

    Attributes:
        data: A JSON Lines file of {"prompt", "completion"}, {"messages": [...]} or {"text"}.
            Without it, labelled tweets (4.5 MB, fetched once), to be called negative, neutral or
            positive.
        held_out: Examples kept for evaluation: a number, or a fraction below 1. By default 300
            tweets, or a tenth of a file of your own.
        rows: Rows in a batch, times `accumulate`.
        row_length: Tokens in a row. Several examples share one; longer ones are left out, and
            reported.
    """

    data: Path | None = None
    held_out: float | None = None
    rows: int = 1
    row_length: int = 256


@dataclasses.dataclass(frozen=True)
class LoraOptions:
    """The adapter.

    Attributes:
        rank: Inner dimension of the update A B of every weight.
        alpha: The update is scaled by alpha / rank.
        targets: Which weights: all-linear, or glob patterns such as '*/q_proj/kernel'. The output
            head is left out of all-linear.
        exclude: Glob patterns of weights to leave out of the targets.
        dropout: Probability of dropping an element of an adapter's input in training.
        rank_stabilized: Scale by alpha / sqrt(rank) instead.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("all-linear",)
    exclude: tuple[str, ...] = ()
    dropout: float = 0.0
    rank_stabilized: bool = False

    def config(self, *, tied_head: bool) -> LoraConfig:
        """The library's config for a decoder.

        Args:
            tied_head: whether the decoder's head is its embedding table, which is no target then.
        """
        every = self.targets == ("all-linear",)
        head = ("lm_head/*",) if every and not tied_head else ()
        return LoraConfig(
            rank=self.rank,
            alpha=self.alpha,
            targets="all-linear" if every else self.targets,
            exclude=(*self.exclude, *head),
            dropout_rate=self.dropout,
            scaling="rank_stabilized" if self.rank_stabilized else "standard",
        )


@dataclasses.dataclass(frozen=True)
class OptimizerOptions:
    """AdamW and its schedule.

    Attributes:
        learning_rate: The highest, reached after the warm-up.
        schedule: How the learning rate goes on after the warm-up: cosine and linear end at 0.
        warmup: Share of the steps over which the learning rate rises from 0.
        weight_decay: Decoupled, of the adapter's leaves.
        clip: Longer gradients are scaled down to this global norm; 0 for no clipping.
        accumulate: Micro-batches of `rows` rows that make up one update, one in memory at a time.
        paged: Keep the optimizer's state in the host's memory between steps. Refused where the
            device has no way to its host's memory.
    """

    learning_rate: float = 1e-3
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.1
    weight_decay: float = 0.0
    clip: float = 1.0
    accumulate: int = 1
    paged: bool = False

    def check(self) -> None:
        """Raises ValueError, with the option's name, where a value is out of range."""
        for name, holds, expected in (
            ("learning_rate", self.learning_rate > 0, "a positive number"),
            ("warmup", 0 <= self.warmup <= 1, "a share from 0 to 1"),
            ("weight_decay", self.weight_decay >= 0, "0 or more"),
            ("clip", self.clip >= 0, "0 or more"),
            ("accumulate", self.accumulate >= 1, "at least 1"),
        ):
            if not holds or not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)}.")

    def learning_rates(self, steps: int) -> optax.Schedule:
        """The learning rate of each step: update number -> float."""
        rising = round(self.warmup * steps)
        falling = max(1, steps - rising)
        after = {
            "cosine": optax.cosine_decay_schedule(self.learning_rate, falling),
            "linear": optax.linear_schedule(self.learning_rate, 0.0, falling),
            "constant": optax.constant_schedule(self.learning_rate),
        }[self.schedule]
        # From the first step on, so that no update is lost on a learning rate of 0.
        rise = optax.linear_schedule(
            self.learning_rate / (rising + 1), self.learning_rate, max(1, rising)
        )
        return optax.join_schedules([rise, after], [rising])

    def optimizer(self, steps: int) -> optax.GradientTransformation:
        """AdamW with that schedule."""
        tx = optax.adamw(self.learning_rates(steps), weight_decay=self.weight_decay)
        return offload(tx) if self.paged else tx


@dataclasses.dataclass(frozen=True)
class FinetuneOptions:
    """Fine-tune a language model with low-rank adapters.

    Without any option: SmolLM2-135M-Instruct learns to tell the sentiment of tweets.

    Attributes:
        steps: Updates. By default as many as take about 5 minutes on two cores for the tweets, or
            `epochs` for a file of your own.
        epochs: How often each example of your own file is seen, unless `steps` is given.
        evaluations: How often to evaluate, and save, between the start and the end.
        seed: Of the split, the order, the adapter's start and dropout: the same seed, the same run.
        out: Folder for the results; by default runs/MODEL-DATA.
        resume: Go on with the run in the output folder, with its options except those given again.
        overwrite: Replace the run in the output folder.
        save_every: Save after every so many steps, in the background. What a killed run loses is
            at most that much.
        keep: How many checkpoints to keep: the last ones, and the one with the lowest loss on the
            held-out examples.
        resume_from: With --resume: go on after this step instead of the last one saved. Later
            checkpoints are removed, for their steps are done again.
    """

    model: ModelOptions = dataclasses.field(default_factory=ModelOptions)
    devices: DeviceOptions = dataclasses.field(default_factory=DeviceOptions)
    data: DataOptions = dataclasses.field(default_factory=DataOptions)
    lora: LoraOptions = dataclasses.field(default_factory=LoraOptions)
    optimizer: OptimizerOptions = dataclasses.field(default_factory=OptimizerOptions)

    steps: int | None = None
    epochs: int = 3
    evaluations: int = 2
    seed: int = 0
    out: Path | None = None
    resume: bool = False
    overwrite: bool = False
    save_every: int = 50
    keep: int = 2
    resume_from: int | None = None

    def check(self) -> None:
        """Raises ValueError, with the option's name, where a value is out of range."""
        self.optimizer.check()
        if self.out is not None:
            local(self.out)
        if self.devices.mesh is not None:
            parse_mesh(self.devices.mesh)
        held_out = self.data.held_out
        for name, holds, expected, got in (
            ("steps", self.steps is None or self.steps >= 1, "at least 1", self.steps),
            ("epochs", self.epochs >= 1, "at least 1", self.epochs),
            ("evaluations", self.evaluations >= 0, "0 or more", self.evaluations),
            ("rows", self.data.rows >= 1, "at least 1", self.data.rows),
            ("row_length", self.data.row_length >= 2, "at least 2", self.data.row_length),
            (
                "held_out",
                held_out is None or 0 < held_out < 1 or (held_out >= 1 and held_out % 1 == 0),
                "a whole number, or a fraction between 0 and 1",
                held_out,
            ),
            ("resume", not (self.resume and self.overwrite), "it without --overwrite", "both"),
            ("save_every", self.save_every >= 1, "at least 1", self.save_every),
            ("keep", self.keep >= 1, "at least 1", self.keep),
            (
                "resume_from",
                self.resume_from is None or self.resume,
                "it together with --resume",
                self.resume_from,
            ),
        ):
            if not holds:
                raise ValueError(f"{name}: expected {expected}, got {got}.")

    def folder(self) -> Path:
        """Where the results go."""
        if self.out is not None:
            return self.out
        if self.model.model == SMOLLM2 and self.data.data is None:
            return Path("runs") / "smollm2-sentiment"
        model = self.model.model.rstrip("/").rsplit("/", 1)[-1].removesuffix(".gguf")
        return Path("runs") / f"{model}-{self.data.data.stem if self.data.data else TWEETS}"

    @classmethod
    def qlora(cls) -> FinetuneOptions:
        """The defaults that go with a quantized base: the paper's recipe (arXiv:2305.14314)."""
        return cls(
            lora=LoraOptions(rank=64, alpha=16.0),
            optimizer=OptimizerOptions(schedule="constant", warmup=0.03, clip=0.3),
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain values, ready for JSON."""
        plain = dataclasses.asdict(self)
        plain["data"]["data"] = None if self.data.data is None else str(self.data.data)
        # Who takes part is said anew at every start.
        plain["devices"] = {"mesh": self.devices.mesh}
        plain["out"] = None if self.out is None else str(self.out)
        return plain

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FinetuneOptions:
        """The inverse of `to_dict`, also after JSON.

        Raises:
            ValueError, TypeError, KeyError: the values are not those of a run.

        Example:
            >>> FinetuneOptions.from_dict(FinetuneOptions(steps=3).to_dict()).steps
            3
        """
        fields = dict(values)
        data, lora = dict(fields["data"]), dict(fields["lora"])
        data["data"] = None if data["data"] is None else Path(data["data"])
        lora |= {name: tuple(lora[name]) for name in ("targets", "exclude")}
        out = fields["out"]
        return cls(
            **{
                **fields,
                "model": ModelOptions(**fields["model"]),
                "devices": DeviceOptions(**fields["devices"]),
                "data": DataOptions(**data),
                "lora": LoraOptions(**lora),
                "optimizer": OptimizerOptions(**fields["optimizer"]),
                "out": None if out is None else Path(out),
            }
        )
