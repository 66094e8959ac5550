"""Figures: what a check measured, against its goal.

A check appends figures to the file that $FIGURES names. `figures.py FILE [--json]` prints them all, as a table or as one
JSON line each, and exits with 1 unless there are figures and every one meets its goal. Needs the standard library only.
"""

import json
import math
import os
import sys


def at_most(figure, value, goal, unit=""):
    _record(figure, value, unit, f"<= {goal:g}", value <= goal)


def at_least(figure, value, goal, unit=""):
    _record(figure, value, unit, f">= {goal:g}", value >= goal)


def exactly(figure, value, goal, unit=""):
    _record(figure, value, unit, f"= {goal:g}", value == goal)


def noted(figure, value, unit=""):
    """Measured without a goal."""
    _record(figure, value, unit, "none", True)


def told(text):
    """Progress and details: for the reader of the terminal, never part of the result."""
    print(text, file=sys.stderr, flush=True)


def _record(figure, value, unit, goal, met):
    # NaN compares false with everything, and so is never met; JSON has no word for it, nor for infinity, but null.
    row = {"figure": figure, "value": value if math.isfinite(value) else None, "unit": unit, "goal": goal, "met": bool(met)}
    with open(os.environ["FIGURES"], "a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
    told(f"   figure {figure}: {_shown(value)} {unit} (goal {goal}): {'met' if met else 'NOT MET'}")


def _shown(value):
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(rows):
    head = ("figure", "value", "unit", "goal", "met")
    lines = [head] + [
        (row["figure"], _shown(row["value"]), row["unit"], row["goal"], "yes" if row["met"] else "NO") for row in rows
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    if "--json" in sys.argv[2:]:
        for row in rows:
            print(json.dumps(row, ensure_ascii=False))
    else:
        _table(rows)
    sys.exit(0 if rows and all(row["met"] for row in rows) else 1)
