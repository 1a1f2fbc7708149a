"""Every name that a script or benchmark takes from the package is there, also where only a slow run asks for it."""

import ast
import importlib
from pathlib import Path

import pytest
from running import ROOT

FILES = sorted([*(ROOT / "scripts").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")])


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_what_a_script_imports_is_there(file: Path):
    for node in ast.walk(ast.parse(file.read_text())):
        if not (isinstance(node, ast.ImportFrom) and node.module.startswith("tinydpo")):
            continue
        if node.module == "tinydpo.playground.app":
            pytest.importorskip("gradio", reason="needs the extra 'playground'")
        module = importlib.import_module(node.module)
        for name in (alias.name for alias in node.names):
            there = hasattr(module, name) or importlib.util.find_spec(f"{node.module}.{name}")
            assert there, f"{file.name} imports {name} from {node.module}, which has no such name"
