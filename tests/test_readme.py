"""The README says what is there: files, links, flags, methods, code and the picture of the matrix."""

import ast
import importlib
import inspect
import re
import runpy
import shlex
from pathlib import Path

import pytest

from pipelines.cli import parser
from pipelines.configure import MODEL_DEFAULTS
from pipelines.methods import METHODS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
FLOORS = ("longvid", "parallel", "pipelines", "scripts")
MADE_BY_THE_TOOL = {"docs/contact-sheet.png", "longvid/assets/tiny/MODEL_CARD.md"}
"""Targets of links that are not written by hand; a release has them, so their absence fails like any other."""


def blocks(language: str) -> list[str]:
    """The README's fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def targets(page: str) -> list[str]:
    """Local targets of a page's links and pictures."""
    found = re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text())
    return sorted({target for target in found if not target.startswith(("http", "#"))})


def mapped() -> set[str]:
    """Paths of the files in the map, which is indented by two spaces for each folder."""
    tree = next(block for block in blocks("text") if block.startswith("longvid/"))
    folders, files = [], set()
    for line in tree.splitlines():
        name = line.split()[0]
        folders = folders[: (len(line) - len(line.lstrip())) // 2]
        if name.endswith("/"):
            folders.append(name)
        else:
            files.add("".join(folders) + name)
    return files


def rows(header: str) -> list[list[str]]:
    """Cells of the table whose header begins so."""
    table = README[README.index(f"| {header} |") :].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def test_the_map_names_every_module_and_nothing_else():
    there = {
        path.relative_to(ROOT).as_posix()
        for floor in FLOORS
        for path in (ROOT / floor).rglob("*")
        if path.suffix in (".py", ".sh", ".sbatch") and path.name != "__init__.py"
    }
    assert mapped() == there


@pytest.mark.parametrize("page, target", [(p, t) for p in ("README.md", "CONTRIBUTING.md") for t in targets(p)])
def test_links_lead_somewhere(page, target):
    assert (ROOT / target).is_file()


def test_what_the_tool_makes_is_shown():
    assert set(targets("README.md")) >= MADE_BY_THE_TOOL


def test_every_table_has_as_many_cells_in_each_row():
    for table in re.findall(r"(?:^\|.*\n)+", README, re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1, table


def test_methods_are_those_of_the_presets():
    table = {row[0].strip("`"): row for row in rows("`--method`")}
    assert list(table) == list(METHODS)
    for name, (_, kind, _, numbers, _) in table.items():
        method = METHODS[name]()
        assert (kind, numbers) == (method.kind, f"{method.num_steps}, {method.lag}")


def test_defaults_of_released_models():
    for name, method, numbers in rows("`transformer/` is a"):
        given = MODEL_DEFAULTS[name.strip("`")]
        expected = f"{given['width']} x {given['height']}, {given['fps']}, {given['num_frames']}"
        assert (method.strip("`"), numbers) == (given["method"], expected)


def test_flags_exist():
    commands = next(action for action in parser()._actions if action.dest == "command").choices
    known = {flag for command in commands.values() for flag in command._option_string_actions}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", README))
    assert named and named <= known


def test_commands_parse():
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("longvid ")]
    used = {parser().parse_args(shlex.split(line)[1:]).command for line in lines}
    assert used == {"generate", "extend", "plan", "bench", "train", "data", "lora", "evaluate"}


def test_scripts_named_exist():
    for script in re.findall(r"(?:bash|python) (scripts/\S+?\.(?:sh|py))", README):
        assert (ROOT / script).is_file()


def test_python_imports_what_exists_and_calls_it_rightly():
    for block in blocks("python"):
        tree, imported = ast.parse(block), {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                imported.update((alias.name, getattr(module, alias.name)) for alias in node.names)
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
        assert imported
        for call in calls:
            if call.func.id in imported:
                keywords = {keyword.arg: None for keyword in call.keywords}
                signature = inspect.signature(imported[call.func.id])
                signature.bind(*call.args, **keywords)
                assert set(keywords) <= set(signature.parameters)


def test_the_picture_of_the_matrix_is_what_the_script_draws():
    drawing = runpy.run_path(str(ROOT / "scripts" / "draw_matrix.py"))["drawing"]
    assert (ROOT / "docs" / "rolling-matrix.svg").read_text(encoding="utf-8") == drawing()
