"""What the documentation points at is there."""

import re

from running import ROOT


def test_each_promise_names_a_test_that_exists():
    tests = re.findall(r"^def (test_\w+)", "".join(p.read_text() for p in (ROOT / "tests").rglob("test_*.py")), re.M)
    for name, shortened in re.findall(r"\b(test_\w+)(?!\w|\.py)(…?)", (ROOT / "docs/reliability.md").read_text()):
        known = any(test.startswith(name) if shortened else test == name for test in tests)
        assert known, f"docs/reliability.md promises what no test shows: there is no {name}"


def test_links_lead_somewhere():
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "recipes").glob("*/*.md")):
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name} links to {link}, which is not there"
