"""Knows the benchmark of the kernels: which module makes the rows of which kernel. Knows no kernel."""

from __future__ import annotations

from importlib import import_module

import torch

from compactor.bench.machine import describe_machine, measure_ceilings
from compactor.bench.random_model import model_dtype
from compactor.bench.report import Report, Row
from compactor.bench.workloads import KERNELS, KernelSettings
from compactor.types import Reporter


@torch.no_grad()
def bench_kernels(settings: KernelSettings, device: torch.device, reporter: Reporter) -> Report:
    """Time each kernel of the settings beside what torch offers for the same work; see the modules of `KERNELS`."""
    settings = settings.on(device.type)
    ceilings = measure_ceilings(device)
    rows: list[Row] = []
    for name in settings.kernels:
        rows += import_module(KERNELS[name]).rows(settings, device, reporter)
    dtype = str(model_dtype(device)).removeprefix("torch.")
    return Report("kernels", describe_machine(device), ceilings, {**settings.to_json(), "dtype": dtype}, rows)
