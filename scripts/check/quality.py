"""Federated training against its alternatives, on the same held-out files: quality.py LOSSES DATA

LOSSES/<contender>/<device>.json is what `participant evaluate --json` prints.
"""

import json
import sys
from pathlib import Path

import figures


def main(folder, data):
    losses = table(folder)
    together = mean(losses["fedavg"])
    pooled = min(mean(losses[name]) for name in losses if name.startswith("pooled"))
    alone = [mean(losses[name]) for name in losses if name.startswith("alone")]
    figures.at_most(f"4 quality, {data}: federated above pooled", 100 * (together / pooled - 1), 3.0, "%")
    worse = sum(one > together for one in alone)
    figures.exactly(f"4 quality, {data}: devices whose training alone is worse for all four", worse, 4, "of 4")


def table(folder):
    """Loss by contender and device; shown as it is read."""
    losses = {}
    for path in sorted(Path(folder).glob("*/*.json")):
        losses.setdefault(path.parent.name, {})[path.stem] = json.loads(path.read_text())["loss_nats"]
    devices = sorted(losses["fedavg"])
    figures.told(f"   {'held-out loss, nats per token':30}" + "".join(f"{device:>12}" for device in [*devices, "mean"]))
    for name, row in losses.items():
        values = [*(row[device] for device in devices), mean(row)]
        figures.told(f"   {name:30}" + "".join(f"{loss:12.4f}" for loss in values))
    return losses


def mean(row):
    return sum(row.values()) / len(row)


if __name__ == "__main__":
    main(*sys.argv[1:])
