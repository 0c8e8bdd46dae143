"""Claims about README.md and docs/: what they name exists, what they show runs, what they say is so."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from tiny_models import TRAINING_TEXT, make_tiny

from compactor.batch.manifest import Record
from compactor.cli.app import load_command
from compactor.config import METHODS
from compactor.evaluate import records
from compactor.evaluate.examples import METRICS
from compactor.evaluate.question_files import read_question_file
from compactor.evaluate.tasks import TASKS
from compactor.families import SUPPORTED_FAMILIES
from compactor.methods import method_module

README = ROOT / "README.md"
ARCHITECTURE, ALGORITHM, BATCH, EVALUATION = (
    ROOT / f"docs/{name}.md" for name in ("architecture", "algorithm", "batch", "evaluation")
)
PAGES = sorted([README, *ROOT.glob("docs/*.md")])
NAMING_PAGES = (ARCHITECTURE, ALGORITHM, BATCH, EVALUATION)  # every dotted name in backticks is one of the code
OUR_COMMANDS = {"compact": "compact", "query": "query", "batch-compact": "batch", "compactor": ""}
FILE_SUFFIXES = (".py", ".md", ".kv", ".toml", ".txt", ".jsonl", ".pdf", ".docx", ".html")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    """Return the fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def prose(page: Path) -> str:
    """Return the text without fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def table(page: Path, first_column: str) -> list[list[str]]:
    """Return the rows of the table whose first column has that title."""
    lines = page.read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first_column} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


# ------------------------------------------------------------------------------------------------------ links


def anchors(page: Path) -> set[str]:
    """Return the anchors that a forge makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        assert there.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors(there), target


def test_readme_links_every_page_of_the_docs() -> None:
    linked = set(re.findall(r"\]\((docs/[\w-]+\.md)\)", README.read_text()))
    assert {name_of(page) for page in PAGES} - {"README.md"} == linked


# --------------------------------------------------------------------------------------------------- examples


@pytest.mark.parametrize("code", blocks(README, "python"))
def test_every_python_example_of_the_readme_runs(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As documented: without a name the model is ``$COMPACTOR_MODEL``; here that is a tiny random one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COMPACTOR_MODEL", str(make_tiny("qwen3", tmp_path / "tiny")))
    (tmp_path / "lease.txt").write_text(TRAINING_TEXT)
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(code, "README.md", "exec", dont_inherit=True), names)
    assert (tmp_path / "lease.kv").stat().st_size > 0
    assert names["output"].shape[1] > names["question"].shape[1]
    assert names["past_key_values"].get_seq_length() == names["saved"].metadata.logical_length
    assert capsys.readouterr().out.endswith("\n")


def command_lines() -> Iterator[tuple[str, str]]:
    """Yield page and command of every sh block; a pipe gives two."""
    for page in PAGES:
        for block in blocks(page, "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.shlex(line, posix=True, punctuation_chars="|;&")
                words.whitespace_split = True
                command: list[str] = []
                for word in [*words, "|"]:
                    if set(word) <= set("|;&"):
                        if command:
                            yield name_of(page), shlex.join(command)
                        command = []
                    else:
                        command.append(word)


def test_there_are_command_lines_of_every_command() -> None:
    shown = {shlex.split(line)[0] for _, line in command_lines()}
    assert {"make", *OUR_COMMANDS} <= shown


@pytest.mark.parametrize(("page", "line"), list(command_lines()))
def test_every_command_line_is_one_that_works(page: str, line: str) -> None:
    """Ours are parsed by the commands themselves, which refuse unknown options; none is run."""
    name, *arguments = shlex.split(line)
    if name in OUR_COMMANDS:
        command = load_command(OUR_COMMANDS[name] or arguments.pop(0))
        while arguments and hasattr(command, "commands") and arguments[0] in command.commands:
            command = command.commands[arguments.pop(0)]
        command.make_context(name, arguments)
    elif name == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert arguments and set(arguments) <= set(targets)
    elif name == "pip":
        project = (ROOT / "pyproject.toml").read_text()
        assert arguments[0] == "install" and arguments[1].startswith(".")
        for extra in re.findall(r"[\w-]+", arguments[1]):
            assert re.search(rf"^{extra} = \[", project, flags=re.MULTILINE), extra
    else:
        assert name == "printf", f"{name} is not a command that the documentation may use"


# --------------------------------------------------------------------------------------- what they list


def tree_paths() -> set[str]:
    """Return the paths of the README's tree; names end where two spaces begin."""
    (block,) = blocks(README, "text")
    paths, folder = set(), ""
    for line in block.splitlines():
        inside = line.startswith("  ")
        for name in re.split(r"\s{2,}", line.strip())[0].split():
            paths.add(folder + name if inside else name)
            if not inside:
                folder = name
    return paths


def test_the_tree_names_only_what_exists() -> None:
    for path in tree_paths():
        assert (ROOT / path).exists(), path
        assert (ROOT / path).is_dir() == path.endswith("/"), path


def test_the_tree_names_every_module_and_room() -> None:
    modules = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("compactor/*.py")}
    rooms = {f"{path.parent.relative_to(ROOT).as_posix()}/" for path in ROOT.glob("compactor/*/__init__.py")}
    assert modules | rooms <= tree_paths()


def test_the_readme_names_every_environment_variable_of_the_code_and_no_other() -> None:
    code = "".join(path.read_text() for path in ROOT.glob("compactor/**/*.py"))
    ours = set(re.findall(r"\bCOMPACTOR_[A-Z_]+\b", code))
    shown = {name for cell, _ in table(README, "variable") for name in re.findall(r"`([A-Z_]+)`", cell)}
    assert {name for name in shown if name.startswith("COMPACTOR_")} == ours
    assert {"HF_HOME", "HF_TOKEN", "HF_HUB_OFFLINE"} == {name for name in shown if name.startswith("HF_")}


def test_the_readme_names_every_supported_family_and_no_other() -> None:
    assert [family.strip("`") for family, *_ in table(README, "family")] == list(SUPPORTED_FAMILIES)


def test_the_manifest_page_names_every_field_in_order() -> None:
    documented = [field.strip("`") for field, *_ in table(BATCH, "field")]
    assert documented == [field.name for field in fields(Record)]


def test_the_readme_says_of_every_method_what_its_module_says() -> None:
    shown = {name.strip("`"): sentence for name, sentence in table(README, "method")}
    assert list(shown) == list(METHODS)
    assert shown == {name: method_module(name).SUMMARY for name in METHODS}


def test_the_evaluation_page_names_every_field_of_a_result_in_order() -> None:
    documented = [name for cell, *_ in table(EVALUATION, "field") for name in re.findall(r"`(\w+)`", cell)]
    assert documented == [field.name for field in fields(records.Record)]


def test_the_evaluation_page_names_every_task_and_how_it_is_judged() -> None:
    assert [task.strip("`") for task, *_ in table(EVALUATION, "task")] == list(TASKS)
    for task, _, judged_by in table(EVALUATION, "task"):
        document = TASKS[task.strip("`")].make(2500, 0, lambda text: len(text.split()))
        assert {example.metric for example in document.examples} == set(re.findall(r"`([\w-]+)`", judged_by)), task


def test_the_evaluation_page_names_every_metric() -> None:
    assert {metric.strip("`") for metric, _ in table(EVALUATION, "metric")} == set(METRICS)


def test_the_questions_of_the_evaluation_page_are_read(tmp_path: Path) -> None:
    (block,) = blocks(EVALUATION, "jsonl")
    (tmp_path / "mine.jsonl").write_text(block)
    rent, repairs = read_question_file(str(tmp_path / "mine.jsonl"))
    assert [example.metric for example in rent.examples] == ["exact", "exact"]
    assert [example.metric for example in repairs.examples] == ["choice-likelihood", "choice"]
    assert repairs.examples[0].answers == ("the tenant",)


# ------------------------------------------------------------------------------- what they say of the code


@cache
def modules() -> dict[str, Path]:
    """Return every module below compactor/ by its dotted name, and those of ``compactor_kernels``."""
    found = {}
    for path in ROOT.glob("compactor/**/*.py"):
        name = ".".join(path.relative_to(ROOT / "compactor").with_suffix("").parts)
        found[name.removesuffix(".__init__").replace("__init__", "compactor")] = path
    for path in ROOT.glob("kernels/*.py"):
        found[f"compactor_kernels.{path.stem}"] = path
    return found


def bindings(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    """Return what a module or class binds at its top: functions, classes, constants, fields."""
    found: dict[str, ast.stmt] = {}
    for statement in body:
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            found[statement.name] = statement
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            nodes = [node for target in targets for node in ast.walk(target)]
            found |= {node.id: statement for node in nodes if isinstance(node, ast.Name)}
    return found


def find(dotted: str) -> ast.stmt | None:
    """Return the statement that binds ``module.name`` or ``module.Class.member``, or None."""
    parts = dotted.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        path = modules().get(".".join(parts[:cut]))
        if path is None:
            continue
        found: ast.stmt | None = None
        body = ast.parse(path.read_text()).body
        for part in parts[cut:]:
            found = bindings(body).get(part)
            if found is None:
                return None
            body = found.body if isinstance(found, ast.ClassDef) else []
        return found
    return None


@pytest.mark.parametrize("page", NAMING_PAGES, ids=name_of)
def test_every_name_in_backticks_is_one_of_the_code(page: Path) -> None:
    names = set(re.findall(r"`([A-Za-z_][\w]*(?:\.[\w]+)+)`", prose(page)))
    for name in names:
        if not name.endswith(FILE_SUFFIXES):
            assert name in modules() or find(name) is not None, name
    for path in re.findall(r"`((?:\w+/)*\w+\.py)`", prose(page)):
        assert (ROOT / path).exists() or (ROOT / "compactor" / path).exists(), path


def test_every_symbol_is_made_by_functions_of_the_code() -> None:
    for symbol, _, _, made_by in table(ALGORITHM, "symbol"):
        names = re.findall(r"`([^`]+)`", made_by)
        assert names or made_by == "the model", symbol
        assert all(name in modules() or find(name) is not None for name in names), symbol


def test_every_constant_has_the_value_that_the_page_says() -> None:
    for name, value, _ in table(ALGORITHM, "name"):
        module, _, constant = name.strip("`").rpartition(".")
        statement = bindings(ast.parse(modules()[module].read_text()).body)[constant]
        assert isinstance(statement, ast.Assign)
        (target,) = statement.targets
        actual = ast.literal_eval(statement.value)
        if isinstance(target, ast.Tuple):
            actual = actual[[node.id for node in target.elts if isinstance(node, ast.Name)].index(constant)]
        assert actual == ast.literal_eval(value), name


def imports(body: list[ast.stmt]) -> Iterator[str]:
    """Yield what a module imports, inside functions too, but not what only type checkers read."""
    for statement in body:
        if isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.dump(statement.test):
            continue
        if isinstance(statement, ast.Import):
            yield from (alias.name for alias in statement.names)
        elif isinstance(statement, ast.ImportFrom) and statement.module:
            yield from (f"{statement.module}.{alias.name}" for alias in statement.names)
        for field in ("body", "orelse", "finalbody"):
            yield from imports(getattr(statement, field, []))
        for handler in getattr(statement, "handlers", []):
            yield from imports(handler.body)


def room_of(module: str) -> str:
    """Return the entry of the layers' list that a module belongs to."""
    return module.split(".")[0]


def test_imports_point_one_way() -> None:
    (layers,) = blocks(ARCHITECTURE, "layers")
    order = layers.split()
    doors = {"compactor", "__main__"}
    assert sorted(order) == sorted({room_of(module) for module in modules()} - doors)
    for module, path in modules().items():
        if module in doors:
            continue
        here = order.index(room_of(module))
        for imported in imports(ast.parse(path.read_text()).body):
            top, _, rest = imported.partition(".")
            if top == "compactor" and room_of(rest) in order:
                assert order.index(room_of(rest)) >= here, f"{module} imports {imported}"
            elif top == "compactor_kernels":
                assert order.index(top) >= here, f"{module} imports {imported}"
