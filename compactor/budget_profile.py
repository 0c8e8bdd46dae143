"""Knows budget profiles: which share of the kept keys each KV head gets, learnt from caches. Knows no gains.

A profile is a JSON file. Its shares replace the ranking of one document's own keys; sliding layers take no part.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from compactor.errors import MismatchError, SettingsError

if TYPE_CHECKING:
    import torch

    from compactor.output import AnyPath
    from compactor.types import CacheMetadata, ModelIdentity

FORMAT_VERSION = 1
SUM_TOLERANCE = 1e-6  # of the sum of all shares
BISECTIONS = 200  # halvings of the scale of the shares


@dataclass(frozen=True)
class ProfileModel:
    """The model that a profile is for; the name is for people."""

    name: str
    family: str
    num_layers: int
    num_kv_heads: int
    weights_fingerprint: str

    def describe(self) -> str:
        """Return the model in words."""
        return f"{self.name} ({self.family}, {self.num_layers} layers of {self.num_kv_heads} KV heads)"


@dataclass(frozen=True)
class BudgetProfile:
    """Shares of the kept document keys."""

    model: ProfileModel
    layers: list[int]  # indices of the layers that are compacted
    shares: list[list[float]]  # per layer of ``layers`` and KV head; all together sum to 1
    num_caches: int
    mean_keep_ratio: float

    def to_json(self) -> dict[str, Any]:
        """Return the file's JSON value."""
        return {"format_version": FORMAT_VERSION, **asdict(self)}


def profile_model(identity: ModelIdentity) -> ProfileModel:
    """Return the part of a model's identity that a profile compares, and its name."""
    return ProfileModel(
        identity.name, identity.family, identity.num_layers, identity.num_kv_heads, identity.weights_fingerprint
    )


def make_profile(paths: Sequence[AnyPath]) -> BudgetProfile:
    """Average the shares of caches of one model, each cache counting the same; reads headers only.

    Raises MismatchError for caches of different models, SettingsError for a cache that keeps every key or none (its
    heads say nothing of budgets), CacheFileError for a damaged file.
    """
    from compactor.cache_file import read_metadata

    if not paths:
        raise SettingsError("A budget profile is learnt from caches; give at least one.")
    all_shares, ratios = [], []
    first: CacheMetadata | None = None
    for path in paths:
        metadata, table = read_metadata(path)
        first = first or metadata
        check_same_model(os.fspath(paths[0]), first, os.fspath(path), metadata)
        layers = compacted_layers(metadata)
        counts = [[length - metadata.prefix_length for length in table.head_lengths[index]] for index in layers]
        kept = sum(map(sum, counts))
        document_keys = len(layers) * metadata.model.num_kv_heads * metadata.document_tokens
        if kept in (0, document_keys):
            raise SettingsError(
                f"{os.fspath(path)} keeps {'every' if kept else 'no'} key; leave it out of the profile."
            )
        all_shares.append([[count / kept for count in layer] for layer in counts])
        ratios.append(kept / document_keys)
    assert first is not None
    return BudgetProfile(
        profile_model(first.model),
        compacted_layers(first),
        mean_shares(all_shares),
        len(paths),
        math.fsum(ratios) / len(ratios),
    )


def check_same_model(first_path: str, first: CacheMetadata, path: str, metadata: CacheMetadata) -> None:
    """Raise MismatchError, naming both caches and models, unless two caches are of one model."""
    ours, theirs = profile_model(first.model), profile_model(metadata.model)
    if differing := difference(ours, theirs):
        raise MismatchError(
            f"{first_path} is of {ours.describe()} and {path} of {theirs.describe()}: {differing} differs; a profile "
            "is learnt from caches of one model."
        )
    if first.sliding_windows != metadata.sliding_windows:
        raise MismatchError(
            f"{first_path} and {path} have sliding windows in different layers; take one model's caches."
        )


def difference(ours: ProfileModel, theirs: ProfileModel) -> str:
    """Return what tells two models apart, "" when nothing does; a fingerprint that was not computed is not compared."""
    if (ours.family, ours.num_layers, ours.num_kv_heads) != (theirs.family, theirs.num_layers, theirs.num_kv_heads):
        return "the architecture"
    fingerprints = (ours.weights_fingerprint, theirs.weights_fingerprint)
    return "the fingerprint of the weights" if all(fingerprints) and fingerprints[0] != fingerprints[1] else ""


def compacted_layers(metadata: CacheMetadata) -> list[int]:
    """Return the indices of the layers without a sliding window."""
    return [index for index, window in enumerate(metadata.sliding_windows) if window is None]


def mean_shares(all_shares: list[list[list[float]]]) -> list[list[float]]:
    """Return the mean over caches of (layer, head) shares, scaled to sum to 1."""
    sums = [
        [math.fsum(heads) for heads in zip(*same_layer, strict=True)] for same_layer in zip(*all_shares, strict=True)
    ]
    total = math.fsum(share for layer in sums for share in layer)
    return [[share / total for share in layer] for layer in sums]


def write_profile(path: AnyPath, profile: BudgetProfile, *, force: bool = False) -> None:
    """Write a profile atomically. Raises OutputError; an existing file is refused without ``force``."""
    from compactor.output import write_atomically

    text = json.dumps(profile.to_json(), indent=1, sort_keys=True) + "\n"
    write_atomically(path, [memoryview(text.encode())], force=force)


def read_profile(path: AnyPath, identity: ModelIdentity) -> torch.Tensor:
    """Return the shares for a model, (num_compacted_layers, num_kv_heads) float64, summing to 1.

    Raises MismatchError, naming both models, when the profile is for another one, SettingsError when the file is
    missing or is no profile.
    """
    import torch

    profile = load_profile(path)
    here = profile_model(identity)
    if differing := difference(profile.model, here):
        raise MismatchError(
            f"The budget profile {os.fspath(path)} is for {profile.model.describe()}, but the model here is "
            f"{here.describe()}: {differing} differs; make a profile from this model's caches with `compactor budget`."
        )
    return torch.tensor(profile.shares, dtype=torch.float64)


def load_profile(path: AnyPath) -> BudgetProfile:
    """Read and check a profile, whatever model it is for. Raises SettingsError."""
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
    except OSError as error:
        raise SettingsError(
            f"The budget profile {os.fspath(path)} cannot be read: {error.strerror or error}; make one with "
            "`compactor budget`."
        ) from error
    except (ValueError, RecursionError):
        raise SettingsError(_damaged(path, "it is not JSON")) from None
    if not isinstance(value, dict) or type(value.get("format_version")) is not int:
        raise SettingsError(_damaged(path, "it is JSON of another kind"))
    if value["format_version"] != FORMAT_VERSION:
        raise SettingsError(_damaged(path, f"it has format version {value['format_version']}, not {FORMAT_VERSION}"))
    try:
        model = ProfileModel(**{name: value["model"][name] for name in ProfileModel.__dataclass_fields__})
        profile = BudgetProfile(
            model, value["layers"], value["shares"], value["num_caches"], float(value["mean_keep_ratio"])
        )
        fault = fault_of(profile)
    except (KeyError, TypeError, ValueError):
        fault = "a field is missing or of the wrong type"
    if fault:
        raise SettingsError(_damaged(path, fault))
    return profile


def fault_of(profile: BudgetProfile) -> str:
    """Return which rule a profile breaks, "" when none."""
    model, layers, shares = profile.model, profile.layers, profile.shares
    if not all(isinstance(text, str) for text in (model.name, model.family, model.weights_fingerprint)):
        return "its model is not described in text"
    numbers = [model.num_layers, model.num_kv_heads, profile.num_caches, *layers]
    if not all(type(number) is int for number in numbers) or min(model.num_kv_heads, profile.num_caches) < 1:
        return "a count is not a whole number"
    if not layers or layers != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= model.num_layers:
        return "its layers are not those of the model"
    if len(shares) != len(layers) or any(len(layer) != model.num_kv_heads for layer in shares):
        return "it does not have a share for each layer and KV head"
    flat = [share for layer in shares for share in layer]
    if not all(type(share) in (int, float) and math.isfinite(share) and share >= 0 for share in flat):
        return "a share is not a number from 0 to 1"
    return "" if abs(math.fsum(flat) - 1.0) <= SUM_TOLERANCE else "its shares do not sum to 1"


def _damaged(path: AnyPath, what: str) -> str:
    return f"{os.fspath(path)} is not a budget profile: {what}; make one with `compactor budget`."


# ---------------------------------------------------------------------------------------------------- counts


def allocate_by_shares(shares: torch.Tensor, total: int, num_document: int | torch.Tensor) -> torch.Tensor:
    """Return counts in proportion to ``shares``, of the same shape, int64, summing to ``total`` exactly.

    Every head keeps at least one key and at most ``num_document`` (a number, or one per head; a head that has none
    keeps none). What full heads cannot take goes to the others in proportion; fractions go by largest remainder, ties
    in order.
    Raises SettingsError when ``total`` is below one key a head or above all keys there are.
    """
    import torch

    flat = shares.detach().double().cpu().flatten()
    most = torch.as_tensor(num_document, dtype=torch.int64).cpu().expand(shares.shape).flatten()
    least = most.clamp_max(1)
    if not int(least.sum()) <= total <= int(most.sum()):
        raise SettingsError(
            f"The size target keeps {total} document keys; this budget needs {int(least.sum())} (one a head) to "
            f"{int(most.sum())}."
        )
    flat = flat.clamp_min(float(flat.sum()) * 1e-12) + 1e-300  # a head without a share fills up last
    ideal = fill(flat, total, least, most)
    counts = ideal.floor().long().clamp(least, most)
    order = (ideal - counts).sort(descending=True, stable=True).indices
    open_heads = order[counts[order] < most[order]]
    rest = total - int(counts.sum())
    counts[open_heads[:rest]] += 1
    return counts.view(shares.shape)


def fill(shares: torch.Tensor, total: int, least: torch.Tensor, most: torch.Tensor) -> torch.Tensor:
    """Return x = clamp(t shares, least, most) with sum x = ``total``, float64; t by bisection on its logarithm."""
    low = float((least / shares).min().clamp_min(1e-300).log())
    high = float((most / shares).max().clamp_min(1e-300).log())
    for _ in range(BISECTIONS):
        middle = 0.5 * (low + high)
        if float((math.exp(middle) * shares).clamp(least, most).sum()) < total:
            low = middle
        else:
            high = middle
    return (math.exp(low) * shares).clamp(least, most)
