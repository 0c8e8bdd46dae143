"""Knows all that a loaded model is given in place of its own operations. Knows no module."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compactor.norms import fuse_norms
from compactor.products import fuse_products
from compactor.rotary import fuse_rotary

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def fuse(model: PreTrainedModel) -> None:
    """Give a half-precision model on an NVIDIA GPU kernels for norms, rotary embeddings and products of few rows.

    Elsewhere nothing changes. Answers change by no more than rounding.
    """
    fuse_norms(model)
    fuse_rotary(model)
    fuse_products(model)
