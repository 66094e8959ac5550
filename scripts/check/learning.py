"""The run's held-out loss, before and after: learning.py REPORT.json"""

import json
import sys

import figures

DEVICES = 4


def main(report):
    with open(report, encoding="utf-8") as file:
        losses = {row["name"]: row["held_out"] for row in json.load(file)["participants"]}
    if len(losses) != DEVICES or not all(losses.values()):
        raise SystemExit(f"expected {DEVICES} devices evaluated before and after, found {losses}")
    figures.told(f"   {'held-out loss, nats per token':30}{'base':>10}{'tuned':>10}{'fall':>10}")
    before = {name: loss["before"]["nats"] for name, loss in losses.items()}
    after = {name: loss["after"]["nats"] for name, loss in losses.items()}
    for name in losses:
        figures.told(f"   {name:30}{before[name]:10.4f}{after[name]:10.4f}{fall(before[name], after[name]):8.1f} %")
    # The mean over devices: each counts the same, however many tokens it has.
    figures.at_least("4 demo: fall of the mean held-out loss", fall(sum(before.values()), sum(after.values())), 40, "%")


def fall(before, after):
    return 100 * (1 - after / before)


if __name__ == "__main__":
    main(*sys.argv[1:])
