"""Claims about results that wait: nobody can tell them from computed ones, and what nobody needs is not computed."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional

from compactor.lazy_rows import LazyRows, known, lazy_norm, plain, waiting_norm, waiting_sum

EPSILON = 1e-6
SHAPE = 1, 3, 4, 8  # as heads of rows before they are swapped

Make = Callable[[], tuple[torch.Tensor, torch.Tensor]]  # a waiting tensor, and what it is to be


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


class Norm:
    """An RMS norm in plain torch that counts its calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __call__(
        self,
        rows: torch.Tensor,
        weight: torch.Tensor,
        epsilon: float,
        *,
        out: torch.Tensor,
        addend: torch.Tensor | None = None,
        total: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert type(rows) is torch.Tensor and type(out) is torch.Tensor
        self.calls.append("norm" if addend is None else "sum and norm")
        if addend is not None:
            assert total is not None and type(addend) is type(total) is torch.Tensor
            rows = torch.add(rows, addend, out=total)
        return out.copy_(functional.rms_norm(rows, weight.shape, weight, epsilon))


@pytest.fixture
def norm() -> Norm:
    return Norm()


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape or SHAPE, generator=torch.Generator().manual_seed(seed))


def make_sum(norm: Norm) -> tuple[torch.Tensor, torch.Tensor]:
    left, right = draw(1), draw(2)
    return left + known(right), left + right


def make_norm(norm: Norm) -> tuple[torch.Tensor, torch.Tensor]:
    rows, weight = draw(1), draw(3, 8)
    return lazy_norm(rows, weight, EPSILON, norm), functional.rms_norm(rows, (8,), weight, EPSILON)


def make_swapped(norm: Norm) -> tuple[torch.Tensor, torch.Tensor]:
    found, expected = make_norm(norm)
    return found.transpose(1, 2), expected.transpose(1, 2)


def make_norm_of_sum(norm: Norm) -> tuple[torch.Tensor, torch.Tensor]:
    found, expected = make_sum(norm)
    weight = draw(3, 8)
    return lazy_norm(found, weight, EPSILON, norm), functional.rms_norm(expected, (8,), weight, EPSILON)


KINDS = {"sum": make_sum, "norm": make_norm, "swapped": make_swapped, "norm of a sum": make_norm_of_sum}


@pytest.fixture(params=KINDS)
def make(request: pytest.FixtureRequest, norm: Norm) -> Make:
    return lambda: KINDS[request.param](norm)


class Twice(torch.nn.Module):
    """A module that knows of nothing."""

    def forward(self, rows: torch.Tensor, *, more: torch.Tensor) -> torch.Tensor:
        return rows + rows * more


def stored(rows: torch.Tensor) -> torch.Tensor:
    buffer = io.BytesIO()
    torch.save({"rows": rows}, buffer)
    buffer.seek(0)
    loaded: torch.Tensor = torch.load(buffer, weights_only=True)["rows"]
    return loaded


def at_address(rows: torch.Tensor) -> list[float]:
    import ctypes

    count = rows.untyped_storage().nbytes() // 4
    return list((ctypes.c_float * count).from_address(rows.data_ptr()))


def in_place(change: Callable[[torch.Tensor], object]) -> Callable[[torch.Tensor], torch.Tensor]:
    def run(rows: torch.Tensor) -> torch.Tensor:
        change(rows)
        return rows

    return run


def add_in_place(rows: torch.Tensor) -> torch.Tensor:
    rows += 1.0
    return rows


READS: dict[str, Callable[[torch.Tensor], Any]] = {
    "first": lambda x: x[0],
    "slice": lambda x: x[:, -1:, ..., ::2],
    "mask": lambda x: x[x > 0.5],
    "gather": lambda x: x[:, torch.tensor([2, 0])],
    "ellipsis": lambda x: x[..., None],
    "cat": lambda x: torch.cat([torch.ones(x.shape), x, x], 1),
    "stack": lambda x: torch.stack((x, 2 * x)),
    "linear": lambda x: functional.linear(x, draw(4, 5, 8)) if x.shape[-1] == 8 else None,
    "module": lambda x: Twice()(x, more=x),
    "keyword": lambda x: torch.mul(input=x, other=2.0),
    "matmul": lambda x: x @ x.mT,
    "reversed minus": lambda x: 1.0 - x,
    "add a number": lambda x: x + 1.0,
    "torch.add": lambda x: torch.add(x, x, alpha=3),
    "broadcast": lambda x: x + torch.ones(1, 1, 1, 1),
    "other type": lambda x: x + torch.ones(x.shape, dtype=torch.float64),
    "to": lambda x: x.to(torch.float16),
    "same type": lambda x: x.to(torch.float32),
    "double": lambda x: x.double(),
    "cpu": lambda x: x.cpu(),
    "contiguous": lambda x: x.contiguous(),
    "reshape": lambda x: x.reshape(-1),
    "flatten": lambda x: x.flatten(2),
    "permute": lambda x: x.permute(3, 2, 1, 0),
    "transpose": lambda x: x.transpose(2, 3),
    "transpose back": lambda x: x.transpose(2, 1),
    "transpose by keyword": lambda x: x.transpose(dim0=1, dim1=2),
    "heads first": lambda x: x.transpose(1, 2),
    "heads first twice": lambda x: x.transpose(1, 2).transpose(1, 2),
    "mT": lambda x: x.mT,
    "split": lambda x: x.split([3, 5], -1),
    "chunk": lambda x: x.chunk(2, -1),
    "unbind": lambda x: list(x.unbind(-1)),
    "iterate": list,
    "expand": lambda x: x.expand(2, *x.shape[1:]),
    "clone": torch.clone,
    "detach": lambda x: x.detach(),
    "data": lambda x: x.data,
    "aten": lambda x: torch.ops.aten.mul.Tensor(x, x),
    "softmax": lambda x: x.softmax(-1),
    "attention": lambda x: functional.scaled_dot_product_attention(x, x, x),
    "einsum": lambda x: torch.einsum("abcd,abcd->bc", x, x),
    "item": lambda x: x.sum().item(),
    "compare": lambda x: bool((x == x).all()),
    "format": lambda x: f"{x[0, 0, 0, 0]:.6f}",
    "repr": lambda x: repr(x).replace("LazyRows", "tensor").replace(" ", "").replace("\n", ""),
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: torch.from_numpy(x.numpy().copy()),
    "array": lambda x: torch.from_numpy(x.__array__().copy()),
    "dlpack": lambda x: torch.from_dlpack(x),
    "address": at_address,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "deepcopy in a list": lambda x: copy.deepcopy([x, x]),
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "save": stored,
    "copied into another": lambda x: torch.zeros(x.shape).copy_(x),
    "written where it is": in_place(lambda x: torch.mul(torch.ones(x.shape), 2.0, out=x)),
    "assign": in_place(lambda x: x.__setitem__((0, 1), 7.0)),
    "zero": in_place(lambda x: x[0].zero_()),
    "in place": lambda x: x.mul_(2.0),
    "augmented": add_in_place,
}


def assert_same(found: Any, expected: Any) -> None:
    assert type(found) is type(expected) or isinstance(found, torch.Tensor)
    if isinstance(expected, torch.Tensor):
        found = plain(found)
        assert found.shape == expected.shape and found.dtype == expected.dtype
        assert torch.equal(found, expected)
    elif isinstance(expected, list | tuple) and expected and isinstance(expected[0], torch.Tensor):
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == expected


@pytest.mark.parametrize("name", READS)
def test_every_operation_finds_what_eager_computation_gives(name: str, make: Make, norm: Norm) -> None:
    lazy, eager = make()
    assert isinstance(lazy, LazyRows) and not lazy.waiting.is_done and not norm.calls
    assert_same(READS[name](lazy), READS[name](eager))
    assert_same(lazy, eager)  # whatever was done to it in place is seen in it
    assert len(norm.calls) <= 1


def test_results_are_plain_tensors(make: Make) -> None:
    for name, read in READS.items():
        lazy, _ = make()
        found = read(lazy)
        for one in found if isinstance(found, list | tuple) else [found]:
            waits = isinstance(one, LazyRows) and not one.waiting.is_done
            own = isinstance(one, LazyRows) and one.waiting is lazy.waiting  # itself, or its dimensions swapped
            assert not isinstance(one, LazyRows) or own or waits, name
    for copied in (copy.deepcopy(make()[0]), pickle.loads(pickle.dumps(make()[0])), make()[0].clone(), make()[0] * 1):
        assert type(copied) is torch.Tensor


def test_metadata_computes_nothing(make: Make, norm: Norm) -> None:
    lazy, eager = make()
    for look in (
        lambda x: (x.shape, x.size(), x.size(-1), x.dim(), x.ndim, x.numel(), x.stride(), x.stride(0)),
        lambda x: (x.dtype, x.device, x.layout, x.is_cuda, x.is_meta, x.is_contiguous(), x.is_floating_point()),
        lambda x: (x.requires_grad, x.grad_fn, x.is_inference(), x.element_size()),
        lambda x: isinstance(x, torch.Tensor) and torch.is_tensor(x),
        lambda x: hash(x) == id(x),
    ):
        assert look(lazy) == look(eager)
    assert isinstance(lazy._version, int)
    assert isinstance(lazy, LazyRows) and not lazy.waiting.is_done and not norm.calls


def test_each_is_computed_at_most_once(norm: Norm) -> None:
    for make in (make_norm, make_swapped, make_norm_of_sum):
        norm.calls.clear()
        lazy, eager = make(norm)
        for _ in range(3):
            assert torch.equal(lazy * 2, eager * 2) and torch.equal(plain(lazy), eager)
        assert len(norm.calls) == 1


def test_a_sum_and_its_norm_are_one_call(norm: Norm) -> None:
    left, right, weight = draw(1), draw(2), draw(3, 8)
    total = left + known(right)
    assert waiting_sum(total) is not None and waiting_norm(total) is None
    normed = lazy_norm(total, weight, EPSILON, norm)
    assert torch.equal(normed * 1, functional.rms_norm(left + right, (8,), weight, EPSILON))
    assert norm.calls == ["sum and norm"] and waiting_sum(total) is None
    assert torch.equal(total * 1, left + right)


def test_a_sum_that_was_needed_first_is_not_added_again(norm: Norm) -> None:
    total, eager = make_sum(norm)
    normed = lazy_norm(total, draw(3, 8), EPSILON, norm)
    assert torch.equal(total * 1, eager)
    assert torch.equal(normed * 1, functional.rms_norm(eager, (8,), draw(3, 8), EPSILON)) and norm.calls == ["norm"]


def test_a_chain_of_sums_is_the_residual_stream(norm: Norm) -> None:
    stream, eager = draw(1), draw(1)
    for layer in range(4):
        part, weight = draw(10 + layer), draw(20 + layer, 8)
        stream, eager = stream + known(part), eager + part
        inner = lazy_norm(stream, weight, EPSILON, norm)
        stream = stream + known(plain(inner) * 2)
        eager = eager + functional.rms_norm(eager, (8,), weight, EPSILON) * 2
    assert torch.equal(stream[:], eager) and norm.calls == ["sum and norm"] * 4


def test_what_nobody_needs_is_not_computed(norm: Norm) -> None:
    make_norm(norm)
    lazy_norm(make_sum(norm)[0], draw(3, 8), EPSILON, norm)
    gc.collect()
    assert not norm.calls


def test_a_swapped_norm_and_the_norm_are_the_same_memory(norm: Norm) -> None:
    rows, eager = make_norm(norm)
    swapped = rows.transpose(1, 2)
    assert isinstance(swapped, LazyRows) and swapped.swapped and not norm.calls
    assert waiting_norm(swapped, swapped=True) is waiting_norm(rows) is not None
    assert waiting_norm(swapped) is waiting_norm(rows, swapped=True) is None
    swapped += 1.0
    assert torch.equal(rows * 1, eager + 1.0) and norm.calls == ["norm"]
    view = rows.view(-1)
    view.zero_()
    assert not swapped.any() and not plain(rows).any()


def test_changes_in_place_come_after_what_was_asked_before(norm: Norm) -> None:
    part, other = known(draw(1)), draw(2)
    total = part + other
    normed = lazy_norm(total, draw(3, 8), EPSILON, norm)
    expected = functional.rms_norm(draw(1) + other, (8,), draw(3, 8), EPSILON)
    part.mul_(5.0)
    total.zero_()
    assert torch.equal(plain(normed), expected) and torch.equal(plain(part), draw(1) * 5.0) and not total.any()


def test_sums_that_cannot_wait_are_plain(norm: Norm) -> None:
    rows = known(draw(1))
    others: tuple[Any, ...] = (2.0, draw(2)[:, :1], draw(2).double(), draw(2, 1, 4, 3, 8).transpose(1, 2))
    for other in others:
        found = rows + other
        assert type(found) is torch.Tensor and torch.equal(found, draw(1) + other)
    assert type(rows - draw(2)) is type(rows.add(draw(2), alpha=2)) is torch.Tensor


def test_with_gradients_nothing_waits(norm: Norm) -> None:
    weight = torch.ones(SHAPE, requires_grad=True)
    lazy, eager = make_norm(norm)
    rows = known(draw(1))
    with torch.enable_grad():
        found = rows + weight
        assert type(found) is torch.Tensor and found.requires_grad
        product = lazy * weight
        (found.sum() + product.sum()).backward()
    assert weight.grad is not None and torch.equal(weight.grad, 1.0 + eager)


def test_operands_go_when_they_have_been_read_or_nobody_asks(norm: Norm) -> None:
    gc.collect()
    gc.disable()
    try:
        for is_read in (True, False):
            left, right, weight = draw(1), draw(2), draw(3, 8)
            operands = [weakref.ref(left), weakref.ref(right)]
            total: torch.Tensor | None = left + known(right)
            assert total is not None
            normed: torch.Tensor | None = lazy_norm(total, weight, EPSILON, norm)
            del left, right
            assert all(one() is not None for one in operands)
            if is_read:
                plain(normed)  # type: ignore[arg-type]
            else:
                total = normed = None
            assert all(one() is None for one in operands)
            if is_read:
                assert total is not None and normed is not None
                memory = [weakref.ref(total.waiting), weakref.ref(normed.waiting)]  # type: ignore[attr-defined]
                total = normed = None
                assert all(one() is None for one in memory)
    finally:
        gc.enable()


def test_it_works_in_inference_mode(make: Make) -> None:
    with torch.inference_mode():
        lazy, eager = make()
        assert lazy.is_inference() and torch.equal(lazy * 2, eager * 2)
