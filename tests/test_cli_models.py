from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from tiny_models import make_tiny

from compactor import attention
from compactor.cli import doctor
from compactor.errors import ModelError
from compactor.registry import DEFAULT_MODEL, KNOWN_MODELS, find_known

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODEL_EXIT_CODE = ModelError.exit_code


class FakeHub(BaseHTTPRequestHandler):
    """As much of the hub's protocol as its client uses to fetch a model: one that is there, one gated."""

    folder: ClassVar[Path]
    asked: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, *_arguments: Any) -> None:
        pass

    def _answer(self, *, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        self.asked.append(path)
        files = {file.name: file for file in self.folder.iterdir()}
        if "owner/gated" in path:
            self._send(403, b"{}", {"X-Error-Code": "GatedRepo"}, with_body)
        elif path.startswith(("/api/models/owner/tiny/revision/main", f"/api/models/owner/tiny/revision/{COMMIT}")):
            listing = [{"rfilename": name} for name in files]
            info = {"id": "owner/tiny", "sha": COMMIT, "siblings": listing, "tags": [], "private": False}
            self._send(200, json.dumps(info).encode(), {}, with_body)
        elif path.startswith("/api/models/owner/tiny/revision/"):
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, with_body)
        elif path.startswith("/api/models/owner/tiny/tree/"):
            tree = [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": f"{len(name):040x}"}
                for name, file in files.items()
            ]
            self._send(200, json.dumps(tree).encode(), {}, with_body)
        elif path.startswith("/owner/tiny/resolve/") and (name := path.rsplit("/", 1)[1]) in files:
            headers = {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT}
            self._send(200, files[name].read_bytes(), headers, with_body)
        else:
            self._send(
                404,
                b"{}",
                {"X-Error-Code": "EntryNotFound" if "owner/tiny" in path else "RepoNotFound"},
                with_body,
            )

    def _send(self, code: int, body: bytes, headers: dict[str, str], with_body: bool) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    FakeHub.folder = make_tiny("qwen3", tmp_path_factory.mktemp("hub") / "tiny")
    (FakeHub.folder / "consolidated.safetensors").write_bytes(b"the same weights again")
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("COMPACTOR_", "HF_"))}
    return kept | {
        "HF_HOME": str(tmp_path / "hf"),
        "COMPACTOR_CACHE_DIR": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }


def run(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "compactor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)


# ----------------------------------------------------------------------------------------------------- models


def test_models_lists_every_known_model_with_its_sizes(environment: dict[str, str]) -> None:
    shown = run(environment, "models")
    assert shown.returncode == 0
    for known in KNOWN_MODELS:
        assert sum(line.startswith(known.name) for line in shown.stdout.splitlines()) == 1
    first = next(line for line in shown.stdout.splitlines() if DEFAULT_MODEL in line)
    assert "(default)" in first
    assert "269 MB" in first
    assert "23.0 kB" in first
    assert first.rstrip().endswith("no")


def test_models_json_says_what_is_on_this_machine(environment: dict[str, str], tmp_path: Path) -> None:
    repo = tmp_path / "hf" / "hub" / "models--Qwen--Qwen3-0.6B"
    snapshot = make_tiny("qwen3", repo / "snapshots" / COMMIT)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    listed = run(environment, "models", "--json")
    rows = {row["name"]: row for row in json.loads(listed.stdout)}
    assert rows.keys() == {known.name for known in KNOWN_MODELS}
    assert rows["qwen3-0.6b"]["cached"] == str(snapshot)
    assert [name for name, row in rows.items() if row["cached"]] == ["qwen3-0.6b"]
    assert [name for name, row in rows.items() if row["default"]] == [DEFAULT_MODEL]
    assert rows["qwen3-0.6b"]["weight_bytes"] == 2 * rows["qwen3-0.6b"]["parameters"]


def test_a_half_fetched_model_does_not_count_as_cached(environment: dict[str, str], tmp_path: Path) -> None:
    repo = tmp_path / "hf" / "hub" / "models--Qwen--Qwen3-0.6B"
    (make_tiny("qwen3", repo / "snapshots" / COMMIT) / "model.safetensors").unlink()
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    listed = run(environment, "models", "--json")
    assert not any(row["cached"] for row in json.loads(listed.stdout))


def test_pull_fetches_a_hub_model_that_then_works_offline(environment: dict[str, str], hub: str) -> None:
    FakeHub.asked.clear()
    pulled = run(environment | {"HF_ENDPOINT": hub}, "models", "pull", "owner/tiny", "--json", "-q")
    assert (pulled.returncode, pulled.stderr) == (0, "")
    folder = Path(json.loads(pulled.stdout)["folder"])
    assert folder.name == COMMIT
    assert (folder / "model.safetensors").read_bytes() == (FakeHub.folder / "model.safetensors").read_bytes()
    assert not any("consolidated" in path for path in FakeHub.asked)
    FakeHub.asked.clear()
    code = (
        "from compactor.model import load_model; loaded = load_model('owner/tiny', offline=True);"
        "print(loaded.name, loaded.revision, loaded.identity().revision)"
    )
    command = [sys.executable, "-c", code]
    loaded = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert loaded.stdout.split() == ["owner/tiny", COMMIT, COMMIT], loaded.stderr
    assert FakeHub.asked == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["owner/gated"], "owner/gated is gated: accept its licence on the hub, then set HF_TOKEN"),
        (["owner/absent"], "no such model on the hub"),
        (["owner/tiny", "--revision", "v9"], "owner/tiny has no revision 'v9'"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(
    environment: dict[str, str], hub: str, arguments: list[str], sentence: str
) -> None:
    refused = run(environment | {"HF_ENDPOINT": hub}, "models", "pull", *arguments)
    assert refused.returncode == MODEL_EXIT_CODE
    assert sentence in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1


def test_no_network_is_one_sentence(environment: dict[str, str]) -> None:
    environment |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_ETAG_TIMEOUT": "1"}
    refused = run(environment, "models", "pull", "owner/tiny")
    assert refused.returncode == MODEL_EXIT_CODE
    assert "the hub cannot be reached" in refused.stderr
    refused = run(environment | {"HF_HUB_OFFLINE": "1"}, "models", "pull", "owner/tiny")
    assert refused.returncode == MODEL_EXIT_CODE
    assert "HF_HUB_OFFLINE" in refused.stderr


def test_an_unknown_name_gets_a_suggestion(environment: dict[str, str]) -> None:
    refused = run(environment, "models", "pull", "smolm2")
    assert refused.returncode == MODEL_EXIT_CODE
    assert refused.stderr.strip().endswith(f"did you mean {DEFAULT_MODEL}?")


# ----------------------------------------------------------------------------------------------------- doctor


def test_doctor_reports_this_machine_and_recommends_a_known_model(environment: dict[str, str], tmp_path: Path) -> None:
    seen = run(environment, "doctor", "--json")
    report = json.loads(seen.stdout)
    assert (seen.returncode, report["ok"]) == (0, True)
    findings = {finding["name"]: finding for finding in report["findings"]}
    assert findings["Python"]["value"].startswith(sys.version.split()[0])
    attentions = "attention", "full attention"
    for name in ("torch", "transformers", "safetensors", "GPU", *attentions, "host memory", "CPU cores"):
        assert findings[name]["state"] in ("ok", "note")
    assert findings["cache folder"]["value"].startswith(str(tmp_path / "cache"))
    assert find_known(report["recommended"]["name"]) is not None
    assert not (tmp_path / "cache").exists()


def test_doctor_fails_only_when_something_necessary_is_broken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import typer

    monkeypatch.setattr(doctor, "CONVERSION", ("no_such_library",))
    doctor.doctor()
    assert "note    no_such_library" in capsys.readouterr().out
    monkeypatch.setattr(doctor, "NECESSARY", ("torch", "no_such_library"))
    with pytest.raises(typer.Exit) as stop:
        doctor.doctor()
    assert stop.value.exit_code == 1
    assert "BROKEN  no_such_library" in capsys.readouterr().out


def test_doctor_says_which_attention_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    assert "because" in doctor._attention().value
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "triton", None)
    assert (doctor._attention().value, doctor._attention().state) == (
        "PyTorch, because triton is not installed",
        "note",
    )
    monkeypatch.setitem(sys.modules, "triton", type(sys)("triton"))
    monkeypatch.setattr(doctor, "_kernel_failures", dict)
    assert doctor._attention().value.startswith("Triton") and doctor._attention().state == "ok"
    monkeypatch.setattr(doctor, "_kernel_failures", lambda: {"attention_stats": "it does not compile"})
    finding = doctor._attention()
    assert finding.state == "note" and "attention_stats: it does not compile" in finding.value


@pytest.mark.parametrize(
    ("is_fused", "failure", "state", "told"),
    [
        (False, None, "ok", "products in float32, because fused ones need an NVIDIA GPU"),
        (True, None, "ok", "cuDNN's where it is large, else FlashAttention-2"),
        (True, attention.BEFORE_HOPPER, "ok", f"FlashAttention-2, because of cuDNN's: {attention.BEFORE_HOPPER}"),
        (True, "no plan", "note", "FlashAttention-2, because of cuDNN's: no plan"),
    ],
)
def test_doctor_says_which_attention_reads_full_caches_and_why(
    is_fused: bool, failure: str | None, state: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    if not torch.cuda.is_available():
        assert doctor._full_attention().value.startswith("products in float32, because")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(attention, "fused_available", lambda device: is_fused)
    monkeypatch.setattr(attention, "cudnn_failure", lambda device, dtype, head_dim: failure)
    finding = doctor._full_attention()
    assert finding.state == state and finding.value.startswith(told)


def test_an_unwritable_cache_folder_is_noted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("COMPACTOR_CACHE_DIR", str(tmp_path / "file" / "below"))
    found = doctor._cache_folder()
    assert (found.state, found.remedy) == ("note", "set COMPACTOR_CACHE_DIR")


@pytest.mark.parametrize(
    ("kind", "gigabytes", "cores", "name"),
    [
        ("cpu", 4, 2, DEFAULT_MODEL),
        ("cpu", 64, 2, DEFAULT_MODEL),
        ("cpu", 64, 16, "qwen3-0.6b"),
        ("cpu", 0, 64, DEFAULT_MODEL),
        ("mps", 16, 8, "qwen3-4b"),
        ("cuda", 8, 8, "qwen3-0.6b"),
        ("cuda", 80, 2, "qwen3-8b"),
    ],
)
def test_the_recommended_model_fits_the_machine(kind: str, gigabytes: int, cores: int, name: str) -> None:
    model, why = doctor.recommend(kind, gigabytes * 10**9, cores)
    assert model.name == name
    assert not model.gated
    assert "needs about" in why
