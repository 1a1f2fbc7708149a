"""Every name that a script takes from the package is there, and no script imports much before it reads its flags."""

import ast
import importlib
import os
import sys
from pathlib import Path

import pytest
from running import ROOT, call

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


@pytest.mark.parametrize(
    ("script", "typo"), [("report", "--foldr"), ("quickstart", "--sed"), ("round", "--recip"), ("playground", "--prt")]
)
def test_help_and_typos_answer_at_once(script: str, typo: str):
    for flag in ("--help", typo):
        before = os.times()
        done = call(sys.executable, f"scripts/{script}.py", flag, OMP_NUM_THREADS="1")
        after = os.times()
        seconds = sum(after[2:4]) - sum(before[2:4])  # of processor time in child processes
        assert (done.returncode == 0) == (flag == "--help") and (done.stdout or done.stderr)
        assert seconds < 2, f"{script}.py {flag} takes {seconds:.1f} s: it imports what it does not need yet"
