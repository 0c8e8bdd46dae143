"""Knows which linear modules of a model multiply few rows by the kernel `gemv`. Knows no attention.

A step of decoding is a row, or a few, against all weights. Modules of a half-precision model on an NVIDIA GPU get a
subclass of their own class, whose forward takes the kernel for few rows and does what it did for many; linear modules
that meet the same rows (queries, keys and values of a layer) make their products in one launch, and so does a gated
feed-forward layer with its activation. The files of transformers, its classes and other models stay as they are.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.nn.functional import gelu, linear, silu

from compactor.kernel_trial import usable
from compactor.lazy_rows import known, plain
from compactor.norms import is_half_on_gpu

if TYPE_CHECKING:
    from transformers import PreTrainedModel

JOINED = "q_proj", "k_proj", "v_proj"  # called one after another with the same rows
GATED = "gate_proj", "up_proj", "down_proj", "act_fn"
TRIAL_INPUTS = 512  # of the products that are tried
ROUNDINGS = 8.0  # units in the last place of the largest output by which a feed-forward layer may differ
MAX_ROWS = 2  # as the kernel's
ENDS = "o_proj", "down_proj"  # their results are added to the residual stream
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": silu,
    "gelu_tanh": lambda rows: gelu(rows, approximate="tanh"),
}


def fuse_products(model: PreTrainedModel) -> int:
    """Let the kernel `gemv` multiply few rows in a half-precision model on an NVIDIA GPU; return in how many modules.

    Modules that other code moves between devices (accelerate's hooks), and linear modules of other classes (adapters,
    quantised ones), stay as they are.
    """
    modules = list(model.modules())
    linears = {module for module in modules if is_plain(module)}
    count = 0
    for module in modules:
        parts = [getattr(module, name, None) for name in JOINED]
        if (
            all(part in linears for part in parts)
            and len({part.in_features for part in parts if part is not None}) == 1
        ):
            join(cast(list[torch.nn.Linear], parts))
        if (form := gated_form(module, linears)) is not None:
            module.__class__ = form
            count += 1
    for name, module in model.named_modules():
        if module in linears:
            if type(module) is torch.nn.Linear:
                module.__class__ = FewRowsLinear
            vars(module)["ends_block"] = name.rpartition(".")[2] in ENDS
    return count + len(linears)


def is_plain(module: torch.nn.Module) -> bool:
    """Whether a module is a linear one, on a GPU in half precision, that nobody else has changed."""
    if type(module) is not torch.nn.Linear or "forward" in vars(module) or hasattr(module, "_hf_hook"):
        return False
    weight = module.weight
    if not is_half_on_gpu(weight) or not weight.is_contiguous() or not weight.shape[1]:
        return False
    return usable("gemv", weight.device, weight.dtype, TRIAL_INPUTS)


def takes(rows: torch.Tensor, module: torch.nn.Linear) -> bool:
    """Whether the kernel takes rows (..., num_inputs) of a linear module."""
    few = 0 < rows.numel() <= MAX_ROWS * module.in_features and rows.shape[-1] == module.in_features
    weight = module.weight
    alike = rows.dtype == weight.dtype and rows.device == weight.device
    return few and alike and is_half_on_gpu(weight) and not torch.is_grad_enabled()  # a model may move


def few(input: torch.Tensor) -> torch.Tensor:
    """Return rows (num_rows, num_inputs) as a kernel takes them."""
    return plain(input).reshape(-1, input.shape[-1]).contiguous()


class FewRowsLinear(torch.nn.Linear):
    """A linear module that multiplies few rows by the kernel."""

    ends_block = False  # whether its result is added to a residual stream

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return W x + b of every row."""
        if not takes(input, self):
            return linear(input, self.weight, self.bias)
        (out,) = multiply(input, [self])
        return known(out) if self.ends_block else out


class JoinedLinear(FewRowsLinear):
    """One of several linear modules that are called one after another with the same rows."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return W x + b of every row; the first module makes the products of all."""
        if not takes(input, self):
            return super().forward(input)
        join = cast(Any, self).join
        return cast(torch.Tensor, join.product(self, input))


def multiply(input: torch.Tensor, modules: Sequence[torch.nn.Linear]) -> list[torch.Tensor]:
    """Return W x + b of every row for several linear modules, by one launch."""
    from compactor_kernels.gemv import gemv

    biases = None if modules[0].bias is None else [module.bias for module in modules]
    outs = gemv(few(input), [module.weight for module in modules], biases, settled=True)
    return [out.view(*input.shape[:-1], -1) for out in outs]


class Join:
    """Products of the same rows with the weights of several modules, until each has asked for its own."""

    def __init__(self, members: list[torch.nn.Linear]) -> None:
        self.members = [weakref.ref(member) for member in members]  # they hold this
        self.rows: torch.Tensor | None = None
        self.version = 0
        self.waiting: dict[int, torch.Tensor] = {}

    def product(self, member: torch.nn.Linear, rows: torch.Tensor) -> torch.Tensor:
        """Return one member's product; those of the others are made with it, for rows that do not change."""
        if self.rows is not rows or self.version != version_of(rows) or id(member) not in self.waiting:
            members = [alive for ref in self.members if (alive := ref()) is not None]
            if not any(one is member for one in members):  # a copy of one
                return multiply(rows, [member])[0]
            self._multiply(rows, members)
        out = self.waiting.pop(id(member))
        if not self.waiting:
            self.rows = None
        return out

    def _multiply(self, rows: torch.Tensor, members: list[torch.nn.Linear]) -> None:
        outs = multiply(rows, members)
        self.rows, self.version = rows, version_of(rows)
        self.waiting = {id(member): out for member, out in zip(members, outs, strict=True)}


def version_of(rows: torch.Tensor) -> int:
    """Return how often a tensor was changed in place; inference tensors do not say, and count as unchanged."""
    return 0 if rows.is_inference() else rows._version


def join(members: list[torch.nn.Linear]) -> None:
    """Let the first of some modules that is called with a tensor make the products of all of them."""
    if len({member.bias is None for member in members}) > 1:
        return
    joined = Join(members)
    for member in members:
        member.__class__ = JoinedLinear
        vars(member)["join"] = joined


def gated_form(module: torch.nn.Module, linears: set[torch.nn.Module]) -> type | None:
    """Return a subclass of a gated feed-forward layer's class that makes gate, activation and factor of few rows in one
    launch; None of other modules, and of those whose forward does something else."""
    gate, up, down, activate = (getattr(module, name, None) for name in GATED)
    if gate not in linears or up not in linears or down not in linears or "forward" in vars(module):
        return None
    if gate.bias is not None or up.bias is not None or gate.weight.shape != up.weight.shape:
        return None
    name = activation_name(activate)
    if name is None:
        return None
    form = _form_of(type(module), name)
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(1, gate.in_features, generator=generator).to(gate.weight.device, gate.weight.dtype)
    with torch.no_grad():
        expected, found = module(given).float(), form.forward(module, given).float()
    allowed = ROUNDINGS * torch.finfo(given.dtype).eps * float(expected.abs().max())
    return form if bool(((found - expected).abs() <= allowed).all()) else None


FORMS: dict[tuple[type, str], Any] = {}


def _form_of(kind: type, activation: str) -> Any:
    """Return the subclass, the same one for all layers of a class."""
    if (kind, activation) not in FORMS:
        forward = kind.forward  # type: ignore[attr-defined]

        def few_rows(self: Any, x: torch.Tensor) -> torch.Tensor:
            if not (takes(x, self.gate_proj) and takes(x, self.up_proj)):
                return cast(torch.Tensor, forward(self, x))
            from compactor_kernels.gemv import gated_gemv

            weights = self.gate_proj.weight, self.up_proj.weight
            inner = gated_gemv(few(x), *weights, activation=activation, settled=True)
            return cast(torch.Tensor, self.down_proj(inner.view(*x.shape[:-1], -1)))

        FORMS[kind, activation] = type(kind.__name__, (kind,), {"forward": few_rows})
    return FORMS[kind, activation]


@torch.no_grad()
def activation_name(activate: object) -> str | None:
    """Return the name of an activation by its values; None of those that the kernel does not know."""
    if not callable(activate):
        return None
    points = torch.linspace(-8.0, 8.0, 257)
    values = activate(points)
    for name, function in ACTIVATIONS.items():
        if isinstance(values, torch.Tensor) and torch.allclose(values, function(points), rtol=1e-5, atol=1e-5):
            return name
    return None
