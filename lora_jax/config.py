"""What to adapt and how: `LoraConfig`, and the settings it gives to one weight."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeAlias

import jax.numpy as jnp

Predicate: TypeAlias = Callable[[str, Any], bool]
Targets: TypeAlias = str | tuple[str, ...] | Predicate

ALL_LINEAR = "all-linear"
METHODS = ("lora",)
SCALINGS = ("standard", "rank_stabilized")
STARTS = ("kaiming", "gaussian")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How one weight is adapted: the part of a `LoraConfig` that an override may replace.

    Attributes:
      rank: r, the inner dimension of the update.
      alpha: the numerator of the scale.
      scaling: `"standard"` for alpha / r, `"rank_stabilized"` for alpha / sqrt(r).
      method: the kind of update, one of `METHODS`.
      init: how A starts, one of `STARTS`.
      dropout_rate: the probability of dropping an element of the adapter's input.
      dtype: dtype name of the adapter's leaves, or None for float32, or wider if the base is.
    """

    rank: int = 8
    alpha: float = 16.0
    scaling: Literal["standard", "rank_stabilized"] = "standard"
    method: Literal["lora"] = "lora"
    init: Literal["kaiming", "gaussian"] = "kaiming"
    dropout_rate: float = 0.0
    dtype: str | None = None

    def __post_init__(self) -> None:
        _check(isinstance(self.rank, int) and not isinstance(self.rank, bool) and self.rank >= 1,
               "rank", "an integer of at least 1", self.rank)  # fmt: skip
        _check(_is_number(self.alpha) and math.isfinite(self.alpha) and self.alpha > 0,
               "alpha", "a positive number", self.alpha)  # fmt: skip
        _check(self.scaling in SCALINGS, "scaling", f"one of {SCALINGS}", self.scaling)
        _check(self.method in METHODS, "method", f"one of {METHODS}", self.method)
        _check(self.init in STARTS, "init", f"one of {STARTS}", self.init)
        _check(_is_number(self.dropout_rate) and 0 <= self.dropout_rate < 1,
               "dropout_rate", "a number in [0, 1)", self.dropout_rate)  # fmt: skip
        object.__setattr__(self, "alpha", float(self.alpha))
        object.__setattr__(self, "dropout_rate", float(self.dropout_rate))
        if self.dtype is not None:
            try:
                dtype = jnp.dtype(self.dtype)
            except TypeError:
                dtype = None
            _check(dtype is not None and jnp.issubdtype(dtype, jnp.floating),
                   "dtype", "a floating-point dtype or None", self.dtype)  # fmt: skip
            object.__setattr__(self, "dtype", jnp.dtype(self.dtype).name)

    @property
    def scale(self) -> float:
        """What the product A B is multiplied by."""
        return self.alpha / (self.rank if self.scaling == "standard" else math.sqrt(self.rank))


@dataclasses.dataclass(frozen=True)
class LoraConfig(Settings):
    """Which leaves of a parameter tree get an adapter, and with what settings.

    Paths are a leaf's keys joined with "/", such as `params/layers_0/query/kernel`. A pattern is a
    shell-style glob in which `*` crosses "/": `"*/query/kernel"` finds the query kernel of every
    layer. Settings are those of `Settings`, and apply to every target that no override matches.

    Attributes:
      targets: glob patterns, or a predicate `(path, leaf) -> bool`, or `"all-linear"` for every
        weight that the function multiplies with (looked-up embedding tables are left out).
      exclude: glob patterns of leaves that `targets` matches but that stay frozen.
      overrides: pattern -> {setting: value} for the weights it matches; the first hit wins. Kept
        as a tuple of pairs.
      trainable: glob patterns of leaves trained whole, without an adapter: heads, norms, biases.

    Example:
      >>> config = LoraConfig(rank=4, alpha=8, targets=("*/query/kernel", "*/value/kernel"),
      ...                     overrides={"*/value/kernel": {"rank": 2}})
      >>> config.settings("params/query/kernel").scale
      2.0
      >>> config.settings("params/value/kernel").scale
      4.0
      >>> LoraConfig.from_dict(config.to_dict()) == config
      True

    Raises:
      ValueError: a field is out of range; it is named, with what was expected.
    """

    targets: Targets = ALL_LINEAR
    exclude: tuple[str, ...] = ()
    overrides: Any = ()
    trainable: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.targets) and self.targets != ALL_LINEAR:
            targets = _patterns("targets", self.targets)
            _check(targets != (), "targets", 'at least one pattern, or "all-linear"', self.targets)
            object.__setattr__(self, "targets", targets)
        for field in ("exclude", "trainable"):
            object.__setattr__(self, field, _patterns(field, getattr(self, field)))
        # Kept as tuples so that the config hashes, and in order since the first hit wins.
        overrides = dict(self.overrides)
        object.__setattr__(
            self,
            "overrides",
            tuple((pattern, tuple(dict(fields).items())) for pattern, fields in overrides.items()),
        )
        names = {field.name for field in dataclasses.fields(Settings)}
        for pattern, fields in self.overrides:
            unknown = [name for name, _ in fields if name not in names]
            _check(not unknown, f"overrides[{pattern!r}]", f"only {sorted(names)}", unknown)
            try:
                self._replaced(fields)
            except ValueError as error:
                raise ValueError(f"LoraConfig.overrides[{pattern!r}]: {error}") from None

    def _replaced(self, fields: Iterable[tuple[str, Any]]) -> Settings:
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(Settings)}
        return Settings(**{**own, **dict(fields)})

    def settings(self, path: str) -> Settings:
        """The settings of the weight at `path`: the config's own, or those of its override."""
        for pattern, fields in self.overrides:
            if matches(path, pattern):
                return self._replaced(fields)
        return self._replaced(())

    def to_dict(self) -> dict[str, Any]:
        """As plain values, ready for JSON.

        Raises:
          ValueError: `targets` is a predicate, which cannot be written down.
        """
        if callable(self.targets):
            raise ValueError(
                "LoraConfig.to_dict: targets is a function, which cannot be saved. "
                "Use glob patterns, for instance the paths that the function selected."
            )
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            **fields,
            "targets": self.targets if self.targets == ALL_LINEAR else list(self.targets),
            "exclude": list(self.exclude),
            "trainable": list(self.trainable),
            "overrides": {pattern: dict(values) for pattern, values in self.overrides},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoraConfig:
        """The inverse of `to_dict`.

        Raises:
          ValueError: a key is not a field, or a value does not fit its field.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        _check(not unknown, "from_dict", f"only the keys {sorted(known)}", unknown)
        return cls(**values)


def matches(path: str, pattern: str) -> bool:
    """Whether a glob pattern fits a "/"-joined path.

    A leading "*/" also stands for nothing, so that one pattern fits a module alone and in a model.

    >>> matches("params/query/kernel", "*/query/kernel"), matches("query/kernel", "*/query/kernel")
    (True, True)
    """
    return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase("/" + path, pattern)


def select(paths: Iterable[str], patterns: Iterable[str], *, field: str) -> list[str]:
    """The paths that any of the patterns matches, in the order of `paths`.

    Args:
      paths: those there are.
      patterns: globs.
      field: what the patterns are the value of, for the message.

    Raises:
      ValueError: a pattern matches no path; the nearest ones are shown.
    """
    paths = list(paths)
    for pattern in patterns:
        if not any(matches(path, pattern) for path in paths):
            near = difflib.get_close_matches(pattern, paths, n=5, cutoff=0.3) or paths[:5]
            raise ValueError(
                f"{field}: the pattern {pattern!r} matches none of the {len(paths)} "
                f"parameters. Nearest paths: {', '.join(near) or '(the tree is empty)'}. "
                "Patterns are matched against the whole path; `*` crosses '/'."
            )
    return [path for path in paths if any(matches(path, pattern) for pattern in patterns)]


def _patterns(field: str, value: Any) -> tuple[str, ...]:
    patterns = (value,) if isinstance(value, str) else tuple(value)
    _check(all(isinstance(p, str) and p for p in patterns), field, "glob patterns", value)
    return patterns


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check(holds: bool, field: str, expected: str, got: Any) -> None:
    if not holds:
        raise ValueError(f"LoraConfig.{field}: expected {expected}, got {got!r}.")
