"""The command ``compactor budget``: a budget profile from compacted caches. Knows no torch."""

from __future__ import annotations

from typing import Annotated

import typer

from compactor import console
from compactor.budget_profile import BudgetProfile
from compactor.cli.options import Json
from compactor.cli.units import show_fields


def budget_command(
    files: Annotated[list[str], typer.Argument(metavar="FILE.kv", help="Compacted caches of one model.")],
    output: Annotated[
        str,
        typer.Option("-o", "--output", metavar="PROFILE.json", help="The profile to write, for `compact --budget`."),
    ],
    force: Annotated[bool, typer.Option("-f", "--force", help="Replace an existing file.")] = False,
    json: Json = False,
) -> None:
    """Average how caches of one model share their keys between heads, as a profile for `compact --budget`.

    Reads the headers only. Without a profile, compact ranks each document's own keys.
    """
    from compactor.budget_profile import make_profile, write_profile
    from compactor.output import check_output

    check_output(output, force)
    profile = make_profile(files)
    write_profile(output, profile, force=force)
    if json:
        console.answer_json({"output": output, **profile.to_json()})
    else:
        console.answer(show_profile(output, profile))


def show_profile(output: str, profile: BudgetProfile) -> str:
    """Return what was learnt, for people."""
    shares = [share for layer in profile.shares for share in layer]
    fields: dict[str, object] = {
        "model": profile.model.describe(),
        "caches": f"{profile.num_caches:,}, keeping {profile.mean_keep_ratio:.1%} of their documents' keys on average",
        "shares": f"{len(shares)} heads, {min(shares):.3%} to {max(shares):.3%} of the kept keys, "
        f"{min(shares) * len(shares):.2g} to {max(shares) * len(shares):.2g} times the average",
    }
    return f"{output}\n{show_fields(fields)}"
