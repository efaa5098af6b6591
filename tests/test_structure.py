"""The house: imports only go down, the plan knows no tensor, and the axis legend is held at every call."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = ("longvid", "parallel", "pipelines", "scripts")
FILES = [path for floor in FLOORS for path in sorted((ROOT / floor).rglob("*.py"))]
TREES = {path.relative_to(ROOT): ast.parse(path.read_text()) for path in FILES}


def imported(path, tree):
    """Full names of what a file imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno} imports relatively, which hides the floor"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_imports_only_go_down():
    assert len(TREES) > 20
    up = [
        f"{path} imports {name}"
        for path, tree in TREES.items()
        for name in imported(path, tree)
        if name.split(".")[0] in FLOORS and FLOORS.index(name.split(".")[0]) > FLOORS.index(path.parts[0])
    ]
    assert not up
    assert not [
        path for path, tree in TREES.items() if any(name.startswith("scripts") for name in imported(path, tree))
    ]


@pytest.mark.parametrize(
    "floor, forbidden", [("longvid", ("torch.distributed", "argparse")), ("parallel", ("argparse",))]
)
def test_lower_floors_do_without(floor, forbidden):
    for path, tree in TREES.items():
        if path.parts[0] == floor:
            names = [*imported(path, tree), *(ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute))]
            assert not [name for name in names if name.startswith(forbidden)], path
            calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
            assert not [call.lineno for call in calls if isinstance(call, ast.Name) and call.id == "print"], path


def test_the_plan_is_plain_python():
    modules = "longvid.schedule, longvid.method, longvid.passes, longvid.plan, pipelines.methods"
    code = f"import sys, {modules}; sys.exit(', '.join({{'torch', 'numpy'}} & set(sys.modules)) or 0)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_calls_are_held_to_the_axis_legend():
    import torch

    from longvid.flow import add_noise, guide

    x = torch.zeros(2, 4, 3, 1, 1)
    assert add_noise(x, x, 0.5).shape == add_noise(x, x, torch.zeros(2, 3)).shape == x.shape
    with pytest.raises(AssertionError, match="add_noise: level has shape .1, 3."):
        add_noise(x, x, torch.zeros(1, 3))
    with pytest.raises(AssertionError, match="guide: v_cond has shape .2, 4, 1, 1, 1., its axes are 'b c f h w'"):
        guide(x, x[:, :, :1], 3.0)
    with pytest.raises(AssertionError, match="guide: v_uncond has shape .4, 3, 1, 1."):
        guide(x[0], x[0], 3.0)
