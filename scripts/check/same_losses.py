"""A split run's losses are those of unsplit training, digit by digit.

    same_losses.py NAME LOCAL.jsonl METRICS.jsonl STEPS

LOCAL.jsonl is printed by `participant train --json`, METRICS.jsonl written by the run. Both print a float so that it
can be read back, so equal digits are equal bits.
"""

import json
import sys

import figures


def main(name, local, metrics, steps):
    unsplit = losses(local, lambda row: row.get("event") == "step")
    split = losses(metrics, lambda row: row.get("row") == "step")
    same = [step for step in unsplit if split.get(step) == unsplit[step]]
    for step in sorted(unsplit.keys() | split.keys()):
        if step not in same:
            figures.told(f"   step {step}: unsplit {unsplit.get(step)}, split {split.get(step)}")
            break
    figures.exactly(f"{name}: equal losses, split and unsplit", len(same), int(steps), "steps")


def losses(path, is_step):
    """Loss by step, as the text that stands in the file."""
    with open(path, encoding="utf-8") as file:
        rows = [json.loads(line, parse_float=str) for line in file]
    return {row["step"]: row["loss_nats"] for row in rows if is_step(row)}


if __name__ == "__main__":
    main(*sys.argv[1:])
