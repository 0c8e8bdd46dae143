"""Claims about what the benchmarks of whole models stand on: shapes, random weights and caches, counted work."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from conftest import Command
from torch.utils.flop_counter import FlopCounterMode

from compactor.attach import dense_heads
from compactor.bench.counting import ModelCounts, precision_of
from compactor.bench.random_model import PEAK, ROOM, make_random_model, make_tokenizer, random_tokens
from compactor.bench.shapes import SHAPES
from compactor.bench.synthetic_cache import LEAST_BIAS, MOST_BIAS, CacheMaker, read_bytes
from compactor.bench.workloads import (
    CompactBenchSettings,
    DecodeBenchSettings,
    KernelSettings,
    LoadSettings,
    ragged_lengths,
)
from compactor.errors import SettingsError
from compactor.model import LoadedModel
from compactor.prefill import CONTEXT_SPAN
from compactor.prompt import build_prompt
from compactor.registry import KNOWN_MODELS
from compactor.self_study import WHOLE_PROMPTS

CPU = torch.device("cpu")
PUBLISHED = {"qwen3-4b": "qwen3-4b", "qwen3-8b": "qwen3-8b", "llama-3.1-8b": "llama-3.1-8b-instruct"}


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    return make_random_model("tiny", CPU, seed=0, tokens=1000)


@pytest.fixture(scope="module", params=list(PUBLISHED))
def unmade(request: pytest.FixtureRequest) -> tuple[str, LoadedModel]:
    """A published shape whose weights have no storage."""
    return request.param, make_random_model(request.param, torch.device("meta"), seed=0, tokens=1000)


# ------------------------------------------------------------------------------------------------ shapes and models


def test_shapes_are_those_of_the_models_that_they_are_named_after(unmade: tuple[str, LoadedModel]) -> None:
    name, loaded = unmade
    (known,) = [model for model in KNOWN_MODELS if model.name == PUBLISHED[name]]
    counts = ModelCounts.of(loaded)
    assert sum(weight.numel() for weight in loaded.model.parameters()) == known.parameters
    assert (counts.all_bytes, counts.kv_bytes) == (known.weight_bytes, known.kv_bytes_per_token)
    assert SHAPES[name].num_kv_heads == loaded.num_kv_heads
    assert loaded.window >= known.window


def test_an_embedding_that_is_only_looked_up_is_not_read_by_a_step(unmade: tuple[str, LoadedModel]) -> None:
    name, loaded = unmade
    counts, embedding = ModelCounts.of(loaded), loaded.model.get_input_embeddings().weight
    assert counts.all_bytes - counts.step_bytes == (0 if name == "qwen3-4b" else embedding.nbytes)


def test_a_window_is_as_long_as_the_run_needs_and_never_shorter_than_published() -> None:
    longer = make_random_model("tiny", CPU, seed=0, tokens=5000)
    assert longer.window == 5000 + ROOM
    published = SHAPES["tiny"].fields["max_position_embeddings"]
    assert make_random_model("tiny", CPU, seed=0, tokens=1).window == max(published, 1 + ROOM)


def test_equal_seeds_give_equal_weights_and_leave_the_global_state_alone(tiny: LoadedModel) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    again, other = (make_random_model("tiny", CPU, seed=seed, tokens=1000) for seed in (0, 1))
    assert torch.equal(torch.rand(3), expected)
    name = "model.layers.1.self_attn.q_proj.weight"
    first, second, third = (dict(one.model.named_parameters())[name] for one in (tiny, again, other))
    assert torch.equal(first, second) and not torch.equal(first, third)


@pytest.mark.parametrize("normalised", [True, False], ids=["qwen3", "llama"])
def test_attention_is_peaked(normalised: bool, tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores deviate by `PEAK` squared, whether norms follow the projections or not."""
    loaded = tiny
    if not normalised:
        llama = {
            **SHAPES["llama-3.1-8b"].fields,
            **{name: SHAPES["tiny"].fields[name] for name in SHAPES["tiny"].fields},
        }
        monkeypatch.setitem(SHAPES, "tiny", type(SHAPES["tiny"])("LlamaConfig", llama))
        loaded = make_random_model("tiny", CPU, seed=0, tokens=1000)
    attention = loaded.model.get_decoder().layers[0].self_attn
    hidden = torch.randn(512, 64, generator=torch.Generator().manual_seed(0))
    queries, keys = (project(hidden).view(512, -1, 16) for project in (attention.q_proj, attention.k_proj))
    if normalised:
        queries, keys = attention.q_norm(queries), attention.k_norm(keys)
    scores = torch.einsum("ihd,jhd->hij", queries[:, :2], keys) / 4.0
    assert float(scores.detach().std()) == pytest.approx(PEAK**2, rel=0.2)


def test_the_tokenizer_knows_the_prompts_and_any_text() -> None:
    tokenizer = make_tokenizer()
    prompt = build_prompt(tokenizer)
    assert prompt.prefix_ids and prompt.suffix_ids
    for text in WHOLE_PROMPTS:
        own = len(prompt.question_ids(text)) - len(prompt.question_ids(""))
        assert own < 1.5 * len(text.split()), "as many tokens as words, not as letters"
    odd = "Ünïcode, 3.14 & \u4f60\u597d"
    assert tokenizer.decode(prompt.question_ids(odd)[: -len(prompt.suffix_ids)]).endswith(odd)
    assert len(tokenizer) <= SHAPES["tiny"].fields["vocab_size"]


def test_random_tokens_are_ordinary_ones(tiny: LoadedModel) -> None:
    drawn = random_tokens(tiny, 5000, 3)
    assert drawn == random_tokens(tiny, 5000, 3) != random_tokens(tiny, 5000, 4)
    assert not set(drawn) & set(tiny.tokenizer.all_special_ids)
    assert max(drawn) < len(tiny.tokenizer)


# ------------------------------------------------------------------------------------------------ synthetic caches


def test_lengths_are_geometric_and_average_what_is_asked() -> None:
    lengths = ragged_lengths(1229, 20.0, 8, 61_440)
    assert sum(lengths) == pytest.approx(8 * 1229, abs=8)
    assert lengths[-1] / lengths[0] == pytest.approx(20.0, rel=0.01)
    ratios = [later / earlier for earlier, later in pairwise(lengths)]
    assert max(ratios) == pytest.approx(min(ratios), rel=0.02)
    assert ragged_lengths(7, 1.0, 3, 10) == [7, 7, 7] and ragged_lengths(5, 9.0, 1, 10) == [5]
    with pytest.raises(SettingsError, match="--spread 20 the longest head would keep"):
        ragged_lengths(400, 20.0, 8, 1000)


def test_kept_layers_are_ragged_and_keep_prefix_and_distinct_places() -> None:
    maker = CacheMaker(100, 3, 16, torch.bfloat16, CPU, seed=1)
    first, second = maker.kept([4, 10, 40]), maker.kept([4, 10, 40])
    for layer in (first, second):
        assert sorted(layer.head_lengths) == [7, 13, 43]
        assert layer.keys.dtype == layer.values.dtype == torch.bfloat16 and layer.keys.shape == (63, 16)
        for start, stop in pairwise(layer.offsets.tolist()):
            positions = layer.positions[start:stop].tolist()
            assert positions[:3] == [0, 1, 2] and positions == sorted(set(positions)) and positions[-1] < 103
            assert not layer.biases[start : start + 3].any()
            own = layer.biases[start + 3 : stop]
            assert bool(((own >= LEAST_BIAS) & (own <= MOST_BIAS)).all()) and len(own.unique()) == len(own)
    assert not torch.equal(first.keys, second.keys)
    assert torch.equal(first.keys, CacheMaker(100, 3, 16, torch.bfloat16, CPU, seed=1).kept([4, 10, 40]).keys)


def test_read_bytes_are_those_of_the_tensors_that_attention_reads() -> None:
    maker = CacheMaker(50, 2, 16, torch.float32, CPU, seed=0)
    kept, full = maker.kept([5, 9]), maker.full(2)
    assert read_bytes([kept]) == (5 + 9 + 4) * (2 * 16 * 4 + 4)
    assert read_bytes([full, full], with_biases=False) == 2 * 2 * 52 * 2 * 16 * 4
    assert dense_heads(full)[0].shape == (1, 2, 52, 16)
    last = maker.last(2, 11)
    assert last.head_lengths == [10, 10] and last.positions.tolist() == 2 * list(range(42, 52))


# ---------------------------------------------------------------------------------------------------- counted work


def test_qwen3_4b_costs_what_is_counted_by_hand() -> None:
    counts = ModelCounts.of(make_random_model("qwen3-4b", torch.device("meta"), seed=0, tokens=1000))
    per_layer = 2560 * 4096 + 2 * 2560 * 1024 + 4096 * 2560 + 3 * 2560 * 9728
    assert (counts.layer_weights, counts.head_weights) == (36 * per_layer, 151_936 * 2560)
    attention = 4 * 36 * 32 * 128 * (32_768 * 32_769 // 2)
    assert counts.prefill(32_768) == 2 * 36 * per_layer * 32_768 + attention == pytest.approx(5.548e14, rel=1e-4)


def test_operations_of_a_pass_are_those_that_torch_counts() -> None:
    loaded, length = make_random_model("tiny", CPU, seed=0, tokens=64), 40
    loaded.model.set_attn_implementation("eager")  # torch does not count its own on a CPU
    ids = torch.tensor([random_tokens(loaded, length, 0)])
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        loaded.model(input_ids=ids, logits_to_keep=3)
    counts = ModelCounts.of(loaded)
    every_pair = counts.attention(length * length)  # the future is not left out
    assert counter.get_total_flops() == pytest.approx(counts.matrices(length, 3) + every_pair, rel=1e-3)


def test_pairs_are_those_that_rows_see(tiny: LoadedModel) -> None:
    counts = ModelCounts.of(tiny)
    per_pair = 2 * 2 * 4 * 16  # two operations in each of 2 layers, 4 heads, 16 dimensions
    assert counts.exact([3, 1], 10) == 2 * per_pair * ((11 + 12 + 13) + 11)
    prefix, document = 5, 2 * CONTEXT_SPAN + 7
    past = [row // CONTEXT_SPAN * CONTEXT_SPAN for row in range(document)]
    assert counts.observed(prefix, document) == per_pair * sum(past)


def test_half_precision_is_bound_by_the_rate_of_bfloat16() -> None:
    names = [precision_of(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)]
    assert names == ["bfloat16", "bfloat16", "float32"]


# -------------------------------------------------------------------------------------------------------- settings


def test_what_is_left_out_follows_the_device() -> None:
    on_gpu, on_cpu = (DecodeBenchSettings().on(kind) for kind in ("cuda", "cpu"))
    assert (on_gpu.shape, on_gpu.tokens, on_gpu.mean_kept) == ("qwen3-4b", 61_440, 1229)
    assert (on_cpu.shape, on_cpu.tokens) == ("tiny", 1024)
    assert CompactBenchSettings().on("cuda").tokens == 32_768
    assert CompactBenchSettings(shape="tiny", tokens=77).on("cuda").tokens == 77
    kernels = KernelSettings().on("cuda")
    assert (kernels.keys, kernels.keep) == (61_440, 1229)
    assert KernelSettings(keep=5000).on("cpu").keys == 5000
    assert LoadSettings(model="somewhere").on("cuda").shape is None


BAD = [
    (["kernels", "--kernels", "magic"], "--kernels does not know 'magic'; give a comma-separated subset of"),
    (["kernels", "--kernels", ""], "--kernels is empty; give"),
    (["kernels", "--batch", "1,x"], "--batch is a comma-separated list of whole numbers, at least 1; give"),
    (["kernels", "--batch", ""], "--batch is a comma-separated list"),
    (["kernels", "--heads", "6", "--kv-heads", "4"], "--heads 6 is not a multiple of --kv-heads 4; change one."),
    (["kernels", "--keys", "10", "--keep", "11"], "--keep 11 is more than --keys 10; keep fewer."),
    (["kernels", "--spread", "0.5"], "--spread is 0.5; the least is 1."),
    (["compact", "--shape", "gpt"], "--shape is 'gpt'; choose from qwen3-4b, qwen3-8b, llama-3.1-8b, tiny."),
    (["compact", "--method", "kvzip"], "--method is 'kvzip'; choose from fast, balanced, best."),
    (["compact", "--tokens", "8"], "--tokens is 8; the least is 64."),
    (["decode", "--keep", "1"], "--keep is 1; give a fraction above 0 and below 1."),
    (["decode", "--new-tokens", "4"], "--new-tokens is 4; the least is 16."),
    (["decode", "--batch", "0"], "--batch is 0; the least is 1."),
    (["decode", "--spread", "nan"], "--spread is nan; the least is 1."),
    (["load", "--shape", "tiny", "-m", "x"], "--shape makes a model with random weights, --model loads one; give only"),
    (["load", "--seed", "-1"], "--seed is -1; give a whole number from 0 to 2**31 - 1."),
]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "sentence"), BAD, ids=lambda value: " ".join(value) if type(value) is list else ""
)
def test_bad_arguments_are_one_sentence_and_exit_code_2(invoke: Command, arguments: list[str], sentence: str) -> None:
    done = invoke("bench", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {sentence}") and done.stderr.count("\n") == 1


PROBE = """
import sys
from compactor.cli import app
for words in (["kernels", "--help"], ["compact", "--help"], ["decode", "--help"], ["load", "--help"],
              ["kernels", "--batch", "0"], ["compact", "--tokens", "1"], ["decode", "--batch", "0"],
              ["load", "--seed", "-1"]):
    try:
        app.run("compactor", app.umbrella, ["bench", *words])
    except SystemExit as stop:
        heavy = ("torch", "transformers", "numpy", "rich.table")
        print("PROBE", stop.code, [name for name in heavy if name in sys.modules])
"""


def test_help_and_bad_arguments_import_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    probed = [line for line in done.stdout.splitlines() if line.startswith("PROBE")]
    assert probed == ["PROBE 0 []"] * 4 + ["PROBE 2 []"] * 4
