"""Knows how a kernel may begin while the one before it ends. Knows no kernel.

Programmatic dependent launch (CUDA C++ programming guide, "Programmatic Dependent Launch and Synchronization"): a
kernel that is launched with ``launch_pdl`` is set up while its predecessor still runs, and calls `gdc_wait` before it
touches anything that a predecessor has written. `gdc_launch_dependents` tells that the next one may be set up.
"""

from __future__ import annotations

import os
from functools import cache

import torch
import triton

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    HAS_DEPENDENT_LAUNCH = True
except ImportError:  # an older Triton: nothing asks for them then
    HAS_DEPENDENT_LAUNCH = False

    @triton.jit
    def gdc_wait():  # type: ignore[no-untyped-def]
        """Do nothing."""

    @triton.jit
    def gdc_launch_dependents():  # type: ignore[no-untyped-def]
        """Do nothing."""


__all__ = ["gdc_launch_dependents", "gdc_wait", "launch_options", "launches_early"]


@cache
def launches_early(device: torch.device) -> bool:
    """Whether kernels on a device are launched before their predecessors have ended: an NVIDIA GPU, Hopper or newer."""
    if device.type != "cuda" or torch.version.hip is not None or not HAS_DEPENDENT_LAUNCH:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0) and os.environ.get("TRITON_INTERPRET") != "1"


def launch_options(device: torch.device) -> dict[str, bool]:
    """Return the options of such a launch; none where there is no such thing."""
    return {"launch_pdl": True} if launches_early(device) else {}
