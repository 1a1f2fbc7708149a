"""Gather the results in a recipe's run folder on one page: figures, curves, answers.

    python scripts/report.py runs/gpt2-medium-hh

Every evaluation, frontier and win-rate run writes the page itself; this writes it again.
"""

import argparse
from pathlib import Path

from tinydpo.errors import report_errors


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write report.html into a recipe's run folder.", allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="runs/<recipe folder>")
    folder = parser.parse_args(argv).folder

    from tinydpo.report.page import write_report  # takes seconds to import

    print(f"Report: {write_report(folder)}")


if __name__ == "__main__":
    with report_errors():
        main()
