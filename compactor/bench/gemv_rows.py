"""Knows how to time products of one and of two rows with weight matrices, as a step of decoding makes them. Knows no
model.

Sizes are those of a layer: queries, keys and values in one launch; a square matrix; gate and up of a feed-forward
layer with the activation. Every weight is read once.
"""

from __future__ import annotations

import torch
from torch.nn.functional import linear, silu

from compactor.bench.counting import precision_of
from compactor.bench.kernel_jobs import Job, Numbers, Way, hidden_sizes, relative, time_jobs
from compactor.bench.random_model import model_dtype
from compactor.bench.report import Row, Work
from compactor.bench.workloads import KernelSettings
from compactor.kernel_trial import usable
from compactor.types import Reporter
from compactor_kernels.reference_gemv import gated_gemv_reference, gemv_reference

ROWS = 1, 2
CHECKED = 64  # outputs of each matrix that errors are of
ACTIVATION = "silu"

Inputs = tuple[torch.Tensor, ...]  # rows and matrices


def rows(settings: KernelSettings, device: torch.device, reporter: Reporter) -> list[Row]:
    """Time `gemv` and `gated_gemv`, their twins and torch's products."""
    hidden, inner = hidden_sizes(settings)
    joined = [heads * settings.head_dim for heads in (settings.heads, settings.kv_heads, settings.kv_heads)]
    works = (("gemv, qkv", joined), ("gemv", [hidden]), ("gated_gemv", [inner, inner]))
    jobs = [_job(settings, device, name, sizes, num_rows) for num_rows in ROWS for name, sizes in works]
    return time_jobs("gemv", jobs, settings, device, reporter)


def _job(settings: KernelSettings, device: torch.device, name: str, sizes: list[int], num_rows: int) -> Job:
    num_inputs, dtype = hidden_sizes(settings)[0], model_dtype(device)
    is_gated, num_out = name == "gated_gemv", sizes[0] if name == "gated_gemv" else sum(sizes)

    def make(numbers: Numbers) -> Inputs:
        given = numbers.normal(num_rows, num_inputs, dtype=dtype)
        return given, *(numbers.normal(size, num_inputs, dtype=dtype) * num_inputs**-0.5 for size in sizes)

    def twin(inputs: Inputs) -> list[torch.Tensor]:
        if is_gated:
            return [gated_gemv_reference(*inputs, activation=ACTIVATION)]
        return gemv_reference(inputs[0], inputs[1:])

    def kernel(inputs: Inputs) -> list[torch.Tensor]:
        from compactor_kernels.gemv import gated_gemv, gemv

        if is_gated:
            return [gated_gemv(*inputs, activation=ACTIVATION, settled=True)]
        return gemv(inputs[0], inputs[1:], settled=True)

    def by_torch(inputs: Inputs) -> list[torch.Tensor]:
        products = [linear(inputs[0], weight) for weight in inputs[1:]]
        return [silu(products[0]) * products[1]] if is_gated else products

    def error(inputs: Inputs, found: list[torch.Tensor]) -> float:
        exact = twin((inputs[0].double(), *(weight[:CHECKED].double() for weight in inputs[1:])))
        return relative(*((one[:, :CHECKED], other) for one, other in zip(found, exact, strict=True)))

    ways = [Way(f"{name}, twin", twin)]
    if device.type == "cuda":
        ways.insert(0, Way(f"{name}, torch", by_torch))
    if usable("gemv", device, dtype, num_inputs):
        ways.insert(0, Way(name, kernel))
    num_bytes = (sum(sizes) * num_inputs + num_rows * (num_inputs + num_out)) * dtype.itemsize
    work = Work(2.0 * num_rows * sum(sizes) * num_inputs, precision_of(dtype), num_bytes)
    return Job({"rows": num_rows, "inputs": num_inputs, "outputs": num_out}, work, make, error, ways)
