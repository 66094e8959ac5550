"""Loss curves with narrower weights against f32's: weights.py FOLDER, which holds what `participant train --json` printed."""

import json
import sys
from pathlib import Path

import figures

GOALS = {"bf16": 0.5, "int8": 1.0}  # per cent


def main(folder):
    expected = curve(folder, "f32")
    for weights, goal in GOALS.items():
        found = curve(folder, weights)
        worst = max(100 * abs(f / e - 1) for f, e in zip(found, expected, strict=True))
        figures.told(f"   {weights}: " + ", ".join(f"{f:.4f} for {e:.4f}" for f, e in zip(found, expected)))
        figures.at_most(f"4 loss curve with {weights} weights against f32", worst, goal, "%")


def curve(folder, weights):
    """Mean losses of the run's quarters."""
    lines = map(json.loads, (Path(folder) / f"{weights}.jsonl").read_text().splitlines())
    losses = [line["loss_nats"] for line in lines if line["event"] == "step"]
    quarter = len(losses) // 4
    return [sum(losses[i * quarter : (i + 1) * quarter]) / quarter for i in range(4)]


if __name__ == "__main__":
    main(*sys.argv[1:])
