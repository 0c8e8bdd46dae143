"""Knows every method by name: ours and the published ones they are compared with, one module each.

A method is a module with ``SUMMARY``, one sentence for people, and

    compact(study: Study, num_kept: int) -> Compacted

which keeps ``num_kept`` document keys over all compacted heads, or a cache of at most as many bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from compactor.solve.shrink import HeadCurve
    from compactor.study import Study
    from compactor.types import LayerCache


@dataclass(frozen=True)
class Compacted:
    """The layers of a compacted cache and what its method says of them."""

    layers: list[LayerCache]  # on any device, keys and values in the storage type
    logical_length: int  # tokens that prefix and document occupy; new tokens start at this position
    report: dict[str, Any] = field(default_factory=dict)  # plain JSON values
    curves: list[list[HeadCurve] | None] | None = None  # per layer, where --keep-curves asks


Method = Callable[["Study", int], Compacted]


def method_module(name: str) -> Any:
    """Return the module of a method of ``config.METHODS``."""
    return import_module(f"compactor.methods.{name.replace('-', '_')}")


def get_method(name: str) -> Method:
    """Return the function ``compact`` of a method of ``config.METHODS``."""
    return cast(Method, method_module(name).compact)
