"""Claims about installing: what the wheel holds, that it runs, that ``kernels/`` stays out of the way."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

SOURCES = ("pyproject.toml", "README.md", "LICENSE", "compactor", "kernels")


def run(*words: str | Path, cwd: Path, path: Path | None = None) -> str:
    environment = {**os.environ, "PYTHONPATH": str(path)} if path else dict(os.environ)
    done = subprocess.run(
        [str(word) for word in words], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", source / "dist", cwd=source)
    (built,) = (source / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel alone, in a folder of its own; its dependencies come from the environment of the tests."""
    target = tmp_path_factory.mktemp("installed")
    options = ("--quiet", "--no-deps", "--no-index", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "install", *options, "--target", target, wheel, cwd=target)
    return target


def test_wheel_holds_every_module_and_the_data(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    ours = [*ROOT.glob("compactor/**/*.py"), *ROOT.glob("compactor/data/*.*"), ROOT / "compactor/py.typed"]
    expected = {path.relative_to(ROOT).as_posix() for path in ours}
    expected |= {f"compactor_kernels/{path.name}" for path in ROOT.glob("kernels/*.py")}
    assert expected - names == set()


def test_wheel_holds_no_package_of_another_project(wheel: Path) -> None:
    folders = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in folders if not name.endswith(".dist-info")} == {"compactor", "compactor_kernels"}


def test_compact_from_the_wheel_shows_its_help(installed: Path) -> None:
    out = run(sys.executable, installed / "bin" / "compact", "--help", cwd=installed, path=installed)
    assert out.startswith("Usage: compact [OPTIONS]")
    assert "--keep-ratio" in out


def test_wheel_has_the_four_commands(installed: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(project["scripts"]) == {"compact", "query", "batch-compact", "compactor"}
    assert {path.name for path in (installed / "bin").iterdir()} == set(project["scripts"])


def test_kernels_are_imported_from_the_wheel(installed: Path) -> None:
    code = "import compactor, compactor_kernels.reference as r; print(compactor.__file__, r.__file__)"
    package, reference = run(sys.executable, "-c", code, cwd=installed, path=installed).split()
    assert Path(package) == installed / "compactor/__init__.py"
    assert Path(reference) == installed / "compactor_kernels/reference.py"


def test_kernels_are_imported_by_the_tests_from_the_folder_kernels() -> None:
    spec = importlib.util.find_spec("compactor_kernels.reference")
    assert spec is not None and spec.origin == str(ROOT / "kernels/reference.py")


def test_folder_kernels_is_no_regular_package() -> None:
    assert not (ROOT / "kernels/__init__.py").exists()


QWEN3 = """
from transformers.utils import import_utils
from transformers.models.qwen3 import modeling_qwen3
import compactor_kernels.reference as reference
print(import_utils.is_kernels_available(), reference.__file__)
"""
# Every name that transformers imports from it takes any argument, and decorates without a trace.
STAND_IN = """
__version__ = "{version}"
class Anything:
    def __init__(self, *args, **kwargs): pass
    def __call__(self, decorated=None, *args, **kwargs): return decorated
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return Anything
"""


def test_transformers_does_not_take_our_folder_for_its_kernels_package() -> None:
    if any((Path(folder) / "kernels/__init__.py").exists() for folder in sys.path):
        pytest.skip("the kernels package of transformers is installed here")
    available, reference = run(sys.executable, "-c", QWEN3, cwd=ROOT).split()
    assert available == "False"
    assert Path(reference) == ROOT / "kernels/reference.py"


def test_the_kernels_package_of_transformers_can_be_installed_beside_ours(tmp_path: Path) -> None:
    from transformers.utils import import_utils

    version = getattr(import_utils, "KERNELS_MIN_VERSION", "0.10.2")
    metadata = tmp_path / f"kernels-{version}.dist-info/METADATA"
    for path, text in (
        (tmp_path / "kernels/__init__.py", STAND_IN.format(version=version)),
        (metadata, f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n"),
    ):
        path.parent.mkdir()
        path.write_text(text)
    available, reference = run(sys.executable, "-c", QWEN3, cwd=ROOT, path=tmp_path).split()
    assert available == "True"
    assert Path(reference) == ROOT / "kernels/reference.py"
    where = run(sys.executable, "-c", "import kernels; print(kernels.__file__)", cwd=ROOT, path=tmp_path)
    assert Path(where.strip()) == tmp_path / "kernels/__init__.py"
