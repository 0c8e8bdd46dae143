"""Knows how to time the products of the least squares: X^T X, and X^T Y with targets of two halves. Knows no fit.

The rows of X are those of all query heads of a KV head, its columns the kept keys. Beside the kernel, on a GPU, torch's
batched product of float16 with float32 sums, added to float64. The work of X^T X counts one half of the result; rows
are read once, float64 sums are read and written once.
"""

from __future__ import annotations

import torch

from compactor.attention import half_product
from compactor.bench.counting import precision_of
from compactor.bench.kernel_jobs import Job, Numbers, Way, kept_sizes, relative, time_jobs
from compactor.bench.report import Row, Work
from compactor.bench.workloads import KernelSettings
from compactor.solve.gram import kernel_runs
from compactor.types import Reporter
from compactor_kernels.reference_gram import add_gram_reference, add_product_reference

ALIGNMENT = 8  # columns: rows begin at multiples of 16 bytes, as those of `kept_shares` do
CHECKED = 64  # rows and columns of the result that are compared

Prepared = tuple[torch.Tensor, ...]  # sums, rows X and, for a product, Y


def rows(settings: KernelSettings, device: torch.device, reporter: Reporter) -> list[Row]:
    """Time `add_gram` and `add_product`, their twins and torch's products."""
    jobs = [_job(settings, device, None), _job(settings, device, 2 * settings.head_dim)]
    return time_jobs("gram", jobs, settings, device, reporter)


def _job(settings: KernelSettings, device: torch.device, num_targets: int | None) -> Job:
    _, columns, per_head = kept_sizes(settings)
    kv_heads, num_rows = settings.kv_heads, per_head * settings.heads // settings.kv_heads
    has_kernel = kernel_runs(torch.empty(0, device=device))
    dtype = torch.float16 if has_kernel or device.type == "cuda" else torch.float32
    width = columns if num_targets is None else num_targets

    def make(numbers: Numbers) -> tuple[torch.Tensor, ...]:
        wide = numbers.normal(kv_heads, num_rows, -(-columns // ALIGNMENT) * ALIGNMENT, dtype=dtype)
        left = wide.abs_()[..., :columns]
        return (left,) if num_targets is None else (left, numbers.normal(kv_heads, num_rows, num_targets, dtype=dtype))

    def prepare(inputs: tuple[torch.Tensor, ...]) -> Prepared:
        return torch.zeros(kv_heads, columns, width, dtype=torch.float64, device=device), *inputs

    def twin(given: Prepared) -> torch.Tensor:
        add_gram_reference(*given) if num_targets is None else add_product_reference(*given)
        return given[0]

    def kernel(given: Prepared) -> torch.Tensor:
        from compactor_kernels.gram import add_gram, add_product

        add_gram(*given) if num_targets is None else add_product(*given)
        return given[0]

    def by_torch(given: Prepared) -> torch.Tensor:
        return given[0].add_(half_product(given[1].mT, given[-1]))

    def error(inputs: tuple[torch.Tensor, ...], found: torch.Tensor) -> float:
        left, right = (part[0, :, :CHECKED].double() for part in (inputs[0], inputs[-1]))
        return relative((found[0, :CHECKED, :CHECKED], left.T @ right))

    name = "add_gram" if num_targets is None else "add_product"
    ways = [Way(f"{name}, twin", twin, prepare)]
    if device.type == "cuda":
        ways.insert(0, Way(f"{name}, torch", by_torch, prepare))
    if has_kernel:
        ways.insert(0, Way(name, kernel, prepare))
    products = columns * (columns + 1) if num_targets is None else 2 * columns * width
    read = columns if num_targets is None else columns + width
    num_bytes = kv_heads * (num_rows * read * dtype.itemsize + 2 * 8 * columns * width)
    work = Work(float(kv_heads * num_rows * products), precision_of(dtype), num_bytes)
    return Job({"keys": columns, "rows": num_rows}, work, make, error, ways)
