"""Knows the options that several commands share: their names and their help. Knows no defaults.

Defaults and limits are those of ``config.py``; a command writes ``seed: Seed = COMPACT_DEFAULTS.seed``, or takes all
of ``CompactSettings`` with `with_settings`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from typing import Annotated, Any

import typer

from compactor.config import CACHE_DTYPES, METHODS, QUERY_SOURCES, CompactSettings, DecodeSettings
from compactor.errors import SettingsError
from compactor.workspace import LEAST_BYTES

COMPACT_DEFAULTS = CompactSettings()
DECODE_DEFAULTS = DecodeSettings()

DEVICE_HELP = "Where the model runs: auto, cpu, cuda, cuda:1, mps."
DTYPE_HELP = "Type of the model's activations: auto, bfloat16, float16, float32."

# Which model, and how it is loaded.
Model = Annotated[
    str | None,
    typer.Option(
        "-m",
        "--model",
        envvar="COMPACTOR_MODEL",
        metavar="MODEL",
        help="Hub id, local folder, GGUF file, or a name from `compactor models`; "
        "without it the embedded SmolLM2-135M-Instruct.",
    ),
]
Revision = Annotated[
    str | None, typer.Option("--revision", metavar="REV", help="Branch, tag or commit of a hub model.")
]
Device = Annotated[str, typer.Option("--device", metavar="DEVICE", help=DEVICE_HELP)]
Dtype = Annotated[str, typer.Option("--dtype", metavar="DTYPE", help=DTYPE_HELP)]
Offline = Annotated[bool, typer.Option("--offline", help="Use only what is already on this machine.")]

# How much is kept.
KeepRatio = Annotated[
    float | None,
    typer.Option(
        "-r",
        "--keep-ratio",
        metavar="FRACTION",
        help="Fraction of the document's keys that is kept, over all layers and heads. "
        f"[default: {COMPACT_DEFAULTS.keep_ratio:g}]",
    ),
]
TargetTokens = Annotated[
    int | None,
    typer.Option("--target-tokens", metavar="N", help="Instead: keys kept per head, on average."),
]
MaxBytes = Annotated[
    int | None, typer.Option("--max-bytes", metavar="N", help="Instead: bytes of all tensors of the file.")
]
MaxError = Annotated[
    float | None,
    typer.Option(
        "--max-error",
        metavar="X",
        help="Instead: the smallest cache whose relative reconstruction error, on the reference queries, is at most X.",
    ),
]

# How it is computed.
Method = Annotated[
    str,
    typer.Option("--method", metavar="NAME", help=f"How keys are chosen and fitted, ours first: {', '.join(METHODS)}."),
]
Budget = Annotated[
    str | None,
    typer.Option(
        "--budget",
        metavar="FILE",
        help="Share the keys among the heads by a profile; without it by this document's own ranking.",
    ),
]
KeepCurves = Annotated[
    bool,
    typer.Option("--keep-curves", help="Keep beside the cache what a smaller one can be made of without the model."),
]
Queries = Annotated[
    str | None,
    typer.Option(
        "--queries",
        metavar="LIST",
        help=f"Where reference queries come from: a comma-separated subset of {','.join(QUERY_SOURCES)}. "
        "[default: those of the method]",
    ),
]
SelfStudyTokens = Annotated[
    int | None,
    typer.Option(
        "--self-study-tokens",
        metavar="N",
        help="Tokens that the model's answers in self-study may have, all prompts together (best: for each of two "
        "questions about a passage); without it 576 and twice the document's, of these 32,768 at most.",
    ),
]
Chunk = Annotated[
    int,
    typer.Option("--chunk", metavar="N", help="Document tokens per piece of the repeat pass."),
]
PrefillChunk = Annotated[
    int, typer.Option("--prefill-chunk", metavar="N", help="Tokens per forward call of the prefill.")
]
Reserve = Annotated[
    int,
    typer.Option(
        "--reserve", metavar="N", help="Tokens of the model's window left free for a question and its answer."
    ),
]
RefineSteps = Annotated[
    int | None,
    typer.Option(
        "--refine-steps",
        metavar="N",
        help="Steps that move kept keys, biases and values together; without it what the method takes, 0 is none.",
    ),
]
Ridge = Annotated[
    float | None,
    typer.Option(
        "--ridge",
        metavar="WEIGHT",
        help="Pull of the fitted values towards the original ones; by default 0.1, without a refinement chosen on "
        "held-out queries.",
    ),
]
MinLogBias = Annotated[float, typer.Option("--min-log-bias", metavar="X", help="Lower end of the biases.")]
MaxLogBias = Annotated[float, typer.Option("--max-log-bias", metavar="X", help="Upper end of the biases.")]
CacheDtype = Annotated[
    str,
    typer.Option(
        "--cache-dtype",
        metavar="DTYPE",
        help=f"Type of keys and values in the file: {', '.join(CACHE_DTYPES)}; "
        "auto is the model's own, bfloat16 for a float32 model.",
    ),
]
System = Annotated[
    str | None,
    typer.Option("-s", "--system", metavar="TEXT", help="System message; it precedes the document and is recorded."),
]
Thinking = Annotated[bool, typer.Option("--thinking", help="Let a model that can think do so before it answers.")]
Seed = Annotated[int, typer.Option("--seed", metavar="N", help="Seed of everything that is sampled.")]

# How faithful it is.
Certify = Annotated[
    bool,
    typer.Option("--certify/--no-certify", help="Measure the distance to the full cache on held-out questions."),
]
RequireKl = Annotated[
    float | None,
    typer.Option(
        "--require-kl",
        metavar="X",
        help="Write nothing when the certificate shows more than X nats per token of KL to the full cache.",
    ),
]
Grow = Annotated[bool, typer.Option("--grow", help="Keep more keys until --require-kl holds, at most all.")]

SETTINGS = {  # by field of CompactSettings, in the order of the help
    "keep_ratio": KeepRatio,
    "target_tokens": TargetTokens,
    "max_bytes": MaxBytes,
    "max_error": MaxError,
    "system": System,
    "method": Method,
    "queries": Queries,
    "self_study_tokens": SelfStudyTokens,
    "chunk": Chunk,
    "prefill_chunk": PrefillChunk,
    "reserve": Reserve,
    "refine_steps": RefineSteps,
    "ridge": Ridge,
    "min_log_bias": MinLogBias,
    "max_log_bias": MaxLogBias,
    "budget": Budget,
    "keep_curves": KeepCurves,
    "cache_dtype": CacheDtype,
    "thinking": Thinking,
    "seed": Seed,
    "certify": Certify,
    "require_kl": RequireKl,
    "grow": Grow,
}

# What it may take.
Workspace = Annotated[
    float | None,
    typer.Option(
        "--workspace",
        metavar="GB",
        help="Gigabytes that may be taken beside weights and full cache: less is done at once, and takes longer. "
        "Without it what suits the device.",
    ),
]

# What is printed.
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Show no progress.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command with a keyword ``settings: CompactSettings`` take the options of `SETTINGS` in its place.

    Calling it raises SettingsError for what CompactSettings refuses.
    """
    defaults = {field.name: None if field.default == () else field.default for field in fields(CompactSettings)}
    keyword = inspect.Parameter.KEYWORD_ONLY
    options = [
        inspect.Parameter(name, keyword, default=defaults[name], annotation=option) for name, option in SETTINGS.items()
    ]

    @wraps(command)
    def run(**given: Any) -> None:
        chosen = {name: given.pop(name) for name in SETTINGS}
        chosen["queries"] = split_list(chosen["queries"])
        command(settings=CompactSettings(**chosen), **given)

    own = inspect.signature(command, eval_str=True)
    parameters = [part for one in own.parameters.values() for part in (options if one.name == "settings" else [one])]
    run.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    return run


def workspace_bytes(gigabytes: float | None) -> int | None:
    """Return the bytes of a bound. Raises SettingsError for what is no size."""
    if gigabytes is None:
        return None
    if not LEAST_BYTES / 1e9 <= gigabytes < float("inf"):
        raise SettingsError(f"--workspace is {gigabytes:g}; give gigabytes, at least {LEAST_BYTES / 1e9:.2g}.")
    return round(gigabytes * 1e9)


def split_list(text: str | None) -> tuple[str, ...]:
    """Split a comma-separated option; empty parts are dropped, without the option there are none."""
    if text is None:
        return ()
    return tuple(part.strip() for part in text.split(",") if part.strip())
