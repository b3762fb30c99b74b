"""What a compiled program computes and sends, read from its text, loops counted by their turns.

XLA's own `cost_analysis` counts the body of a loop once, and says nothing of collectives.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

# `%name (parameters) -> result {`, and `ENTRY %name (...)`.
_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
# `%name = shape operation(operands), attributes`; the shape of a tuple stands in parentheses.
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([a-z][\w-]*)\((.*)$")
_ARRAY = re.compile(r"([a-z]+)(\d*)(?:e\d\w*)?\[([\d,]*)\]")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|branch_computations)=(?:\{([^}]*)\}|(%?[\w.-]+))"
)


@dataclasses.dataclass(frozen=True)
class Traffic:
    """The collectives of one kind, in one execution of the program.

    Attributes:
      count: how many are executed.
      nbytes: what each device sends in them, in a ring of its group of g devices: (g - 1) / g of
        the whole array in an all-gather, a reduce-scatter or an all-to-all, twice that in an
        all-reduce, its array in a permutation.
    """

    count: int
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Work:
    """What one execution of a program does on one device.

    Attributes:
      product_flops: FLOPs of its matrix products, two for each multiplication and addition.
      repeated_flops: those of them in the second and later turns of loops.
      collectives: kind -> traffic, of the kinds that there are.
    """

    product_flops: int
    repeated_flops: int
    collectives: dict[str, Traffic]


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    operation: str
    rest: str

    def attribute(self, name: str) -> str | None:
        """What stands behind `name=`, up to the next comma outside of brackets."""
        found = re.search(rf"\b{name}=(\{{.*?\}}(?:,?\}}|(?=,|$))|\S+?(?=,|$))", self.rest)
        return found and found[1]


def read_program(text: str) -> Work:
    """Reads an optimized HLO module.

    Args:
      text: `jax.stages.Compiled.as_text()`.

    Raises:
      ValueError: how often a loop turns cannot be read, or the size of a collective's groups.
    """
    computations, entry = _computations(text)
    times = _times(computations, entry)
    flops = repeated = 0
    seen: set[str] = set()
    counts: collections.Counter[str] = collections.Counter()
    nbytes: collections.Counter[str] = collections.Counter()
    for name, instructions in computations.items():
        shapes = {instruction.name: instruction.shape for instruction in instructions}
        for each in instructions:
            if each.operation in ("convolution", "dot"):
                one = _product_flops(each, shapes)
                flops += times[name] * one
                repeated += (times[name] - min(times[name], 1)) * one
            kind = each.operation.removesuffix("-start")
            # One that is spread over several fusions stands in each, with the same channel.
            channel = each.attribute("channel_id") or each.name
            if kind in KINDS and channel not in seen and times[name]:
                seen.add(channel)
                counts[kind] += times[name]
                nbytes[kind] += times[name] * _sent(kind, each, shapes)
    return Work(
        flops,
        repeated,
        {kind: Traffic(counts[kind], nbytes[kind]) for kind in KINDS if counts[kind]},
    )


def _computations(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    computations: dict[str, list[_Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            current.append(_Instruction(*found.groups()))
    return computations, entry


def _times(computations: dict[str, list[_Instruction]], entry: str) -> collections.Counter[str]:
    """How often each computation is executed. Those that are called stand before their callers."""
    times: collections.Counter[str] = collections.Counter({entry: 1})
    for name in reversed(computations):
        for each in computations[name]:
            turns = _turns(each, computations) if each.operation == "while" else 1
            for called in _called(each):
                times[called] += times[name] * turns
    return times


def _called(instruction: _Instruction) -> Iterator[str]:
    for several, one in _CALLED.findall(instruction.rest):
        yield from (name.strip().lstrip("%") for name in (several or one).split(","))


def _turns(loop: _Instruction, computations: dict[str, list[_Instruction]]) -> int:
    """How often the body of a loop that counts up from 0 is executed."""
    condition = computations.get((loop.attribute("condition") or "").lstrip("%"), [])
    body = computations.get((loop.attribute("body") or "").lstrip("%"), [])
    limits = [
        int(each.rest.split(")")[0])
        for each in condition
        if each.operation == "constant" and _is_integer(each)
    ]
    counters = [
        int(each.attribute("index") or 0)
        for each in condition
        if each.operation == "get-tuple-element" and _is_integer(each)
    ]
    if len(limits) != 1 or len(counters) != 1 or not body:
        raise ValueError(
            f"{loop.name}: expected a loop of one counter up to one constant, got {len(counters)} "
            f"and {len(limits)} in its condition: how often it turns cannot be read."
        )
    # XLA unrolls the loops that it makes of products and their collectives.
    by_name = {each.name: each for each in body}
    advance = by_name.get(_operands(body[-1])[counters[0]])
    step = 1
    if advance is not None and advance.operation == "add":
        added = (by_name.get(name) for name in _operands(advance))
        step = (
            sum(
                int(each.rest.split(")")[0])
                for each in added
                if each is not None and each.operation == "constant"
            )
            or 1
        )
    return -(-limits[0] // step)


def _is_integer(instruction: _Instruction) -> bool:
    return re.match(r"[su]\d+\[\]", instruction.shape) is not None


def _operands(instruction: _Instruction) -> list[str]:
    return re.findall(r"%([\w.-]+)", instruction.rest.split(")")[0])


def _product_flops(product: _Instruction, shapes: dict[str, str]) -> int:
    """2 b m k n, from the sizes b m k, b k n and b m n of operands and result."""
    operands = _operands(product)[:2]
    sizes = [sum(_sizes(shapes[name])) for name in operands] + [sum(_sizes(product.shape))]
    if product.operation == "dot":
        batch = [
            int(axis) for axis in re.findall(r"\d+", product.attribute("lhs_batch_dims") or "")
        ]
        left = _dimensions(shapes[operands[0]])
        b = math.prod(left[axis] for axis in batch)
    else:
        # On a TPU batches of products are convolutions with a dilated operand.
        dilated = re.search(r"lhs_dilate=([\dx]+)", product.rest)
        b = math.prod(map(int, dilated[1].split("x"))) if dilated else 1
    return 2 * math.isqrt(math.prod(sizes) // b)


def _sent(kind: str, collective: _Instruction, shapes: dict[str, str]) -> int:
    arrays = list(_array_bytes(collective.shape))
    if kind == "collective-permute":
        # An asynchronous one's shape is its operand, its result, and two flags.
        return arrays[0]
    started = collective.operation.endswith("-start")
    whole = max(arrays) if started and kind == "all-gather" else sum(arrays)
    group = _group_size(collective)
    if kind == "reduce-scatter":
        whole *= group
    rounds = 2 if kind == "all-reduce" else 1
    return rounds * whole * (group - 1) // group


def _group_size(collective: _Instruction) -> int:
    """How many devices exchange among themselves; four ways to write it are in use."""
    rest = collective.rest
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", rest):
        return int(found[1])
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest):
        axes = {name: int(size) for name, size in re.findall(r"'([\w.]+)'=(\d+)", found[1])}
        sizes = [
            int(part) if part else axes[name]
            for name, part in re.findall(r"'([\w.]+)'(?::\(\d+\)(\d+))?", found[2])
        ]
        return math.prod(sizes)
    raise ValueError(f"{collective.name}: the size of its groups cannot be read: {rest[:200]}")


def _dimensions(shape: str) -> list[int]:
    found = _ARRAY.search(shape)
    return [int(size) for size in found[3].split(",") if size] if found else []


def _sizes(shape: str) -> Iterator[int]:
    for _, _, sizes in _ARRAY.findall(shape):
        yield math.prod(int(size) for size in sizes.split(",") if size)


def _array_bytes(shape: str) -> Iterator[int]:
    for kind, bits, sizes in _ARRAY.findall(shape):
        width = 8 if kind == "pred" else int(bits or 0)
        yield math.prod(int(size) for size in sizes.split(",") if size) * width // 8
