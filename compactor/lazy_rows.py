"""Knows operations on few rows that wait until somebody needs their result. Knows no model and no kernel.

A step of decoding is a chain of small operations, each a launch that takes longer than its work. Sums of residuals and
RMS norms of few rows are therefore not computed where they stand: their result is a tensor whose memory is not filled
yet. Modules that know of it (`products`, `rotary`) compute them inside their own kernel; any other operation of PyTorch
fills the memory first, so that nobody can see the difference. That is so for all that PyTorch hands to a subclass of
its tensors; `torch.tensor`, `torch.vmap` and ``as_subclass`` it does not. Tensors of PyTorch's own class that have been
added or normalised must not be changed in place before the result is needed.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import torch

METADATA = {
    torch.Tensor.numel,
    torch.Tensor.dim,
    torch.Tensor.size,
    torch.Tensor.stride,
    torch.Tensor.is_contiguous,
    torch.Tensor.is_floating_point,
    torch.Tensor.is_inference,
    torch.Tensor.element_size,
}  # methods that do not read the memory
PROPERTIES = {
    "shape",
    "dtype",
    "device",
    "ndim",
    "is_cuda",
    "requires_grad",
    "_version",
    "layout",
    "grad_fn",
    "is_meta",
}
HEADS_FIRST = (1, 2)  # dimensions that models swap between a norm of each head and its rotary embedding


class Waiting:
    """A result that nobody has asked for yet: a sum of two tensors, or a norm of one."""

    def __init__(self, out: torch.Tensor, operands: tuple[torch.Tensor, ...]) -> None:
        self.out = out  # a plain tensor, the memory of the result
        self.operands = operands
        self.is_done = False
        self.readers: list[weakref.ref[Waiting]] = []  # that this is an operand of
        for part in operands:
            if isinstance(part, LazyRows):
                part.waiting.readers.append(weakref.ref(self))

    def fill(self) -> None:
        """Compute the result, unless that has been done."""
        if not self.is_done:
            self.compute()
            self.done()

    def done(self) -> None:
        """Take note that the memory holds the result."""
        self.is_done, self.operands = True, ()

    def release(self) -> None:
        """Compute the result and all that waits for it: from now on somebody may write into the memory."""
        self.fill()
        readers, self.readers = self.readers, []
        for reader in readers:
            if (waiting := reader()) is not None:
                waiting.fill()

    def compute(self) -> None:
        """Write the result."""
        raise TypeError(f"{type(self).__name__} does not say what it computes")


class WaitingSum(Waiting):
    """The sum of two tensors of one shape."""

    def compute(self) -> None:
        """Write the sum."""
        torch.add(*map(plain, self.operands), out=self.out)


class WaitingNorm(Waiting):
    """An RMS norm of vectors."""

    def __init__(
        self, rows: torch.Tensor, weight: torch.Tensor, epsilon: float, compute: Callable[..., torch.Tensor]
    ) -> None:
        """``compute(rows, weight, epsilon, out=memory)`` is what fills the memory; with ``addend`` and ``total`` it
        adds first and writes the sum."""
        super().__init__(torch.empty(rows.shape, dtype=rows.dtype, device=rows.device), (rows,))
        self.weight, self.epsilon, self.by = weight, epsilon, compute

    def compute(self) -> None:
        """Write the norm."""
        (rows,) = self.operands
        total = waiting_sum(rows)
        if total is None:
            self.by(plain(rows), self.weight, self.epsilon, out=self.out)
            return
        left, right = map(plain, total.operands)
        self.by(left, self.weight, self.epsilon, out=self.out, addend=right, total=total.out)
        total.done()


class LazyRows(torch.Tensor):
    """A tensor whose memory is filled when an operation of PyTorch reads it."""

    waiting: Waiting
    plain: torch.Tensor  # the same memory, without this class
    swapped: bool  # whether its dimensions are those of ``waiting.out`` with `HEADS_FIRST` exchanged

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Wait on with what can wait, fill what is read."""
        if func is torch.Tensor.add and not kwargs and (made := _sum_of(*args)) is not None:
            return made
        if func is torch.Tensor.transpose and not kwargs and (made := _swap(*args)) is not None:
            return made
        owner = getattr(getattr(func, "__self__", None), "__name__", "")
        if func not in METADATA and owner not in PROPERTIES:
            _fill_all((args, kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        """Copy the result as a tensor of PyTorch's own class."""
        return copy.deepcopy(plain(self), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the result as a tensor of PyTorch's own class."""
        return plain(self).__reduce_ex__(protocol)


def lazy(waiting: Waiting, *, swapped: bool = False) -> LazyRows:
    """Return the tensor that a result will be."""
    memory = waiting.out.transpose(*HEADS_FIRST) if swapped else waiting.out
    rows = torch.Tensor._make_subclass(LazyRows, memory)
    rows.waiting, rows.plain, rows.swapped = waiting, memory, swapped
    return rows


def known(rows: torch.Tensor) -> LazyRows:
    """Return a tensor that is computed already as one whose sums wait."""
    waiting = Waiting(rows, ())
    waiting.done()
    return lazy(waiting)


def lazy_norm(
    rows: torch.Tensor, weight: torch.Tensor, epsilon: float, compute: Callable[..., torch.Tensor]
) -> LazyRows:
    """Return the RMS norm of vectors, not computed yet; see `WaitingNorm`."""
    return lazy(WaitingNorm(rows, weight, epsilon, compute))


def plain(rows: torch.Tensor) -> torch.Tensor:
    """Return a tensor of PyTorch's own class that holds the result."""
    if isinstance(rows, LazyRows):
        rows.waiting.fill()
        return rows.plain
    return rows


def waiting_norm(rows: torch.Tensor, *, swapped: bool = False) -> WaitingNorm | None:
    """Return the norm that a tensor still is to become, if it is one."""
    if isinstance(rows, LazyRows) and rows.swapped == swapped and not rows.waiting.is_done:
        return rows.waiting if isinstance(rows.waiting, WaitingNorm) else None
    return None


def waiting_sum(rows: torch.Tensor) -> WaitingSum | None:
    """Return the sum that a tensor still is to become, if it is one."""
    if isinstance(rows, LazyRows) and not rows.swapped and not rows.waiting.is_done:
        return rows.waiting if isinstance(rows.waiting, WaitingSum) else None
    return None


def _sum_of(left: object, right: object) -> LazyRows | None:
    if not isinstance(left, torch.Tensor) or not isinstance(right, torch.Tensor) or torch.is_grad_enabled():
        return None
    if left.shape != right.shape or left.dtype != right.dtype or left.device != right.device:
        return None
    if not all(part.is_contiguous() for part in (left, right)):
        return None
    out = torch.empty(left.shape, dtype=left.dtype, device=left.device)
    return lazy(WaitingSum(out, (left, right)))


def _swap(rows: object, first: object, second: object) -> LazyRows | None:
    if not isinstance(rows, LazyRows) or rows.swapped or waiting_norm(rows) is None or rows.plain.dim() != 4:
        return None
    return lazy(rows.waiting, swapped=True) if (first, second) == HEADS_FIRST else None


def _fill_all(values: object) -> None:
    if isinstance(values, LazyRows):
        values.waiting.release()
    elif isinstance(values, tuple | list):
        for value in values:
            _fill_all(value)
    elif isinstance(values, dict):
        _fill_all(list(values.values()))
