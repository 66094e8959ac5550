"""Figures 1 and 2: whole federations in simulated time, killed at every named point, and with faults drawn from seeds."""

import os
import re
import subprocess
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))
import figures


PLANTED = ["cargo", "run", "--release", "-q", "-p", "coordinator", "--features", "planted-bugs", "--example", "simulate", "--"]


def simulate(*arguments, command=[os.environ["SIMULATE"]]):
    """What the simulator says; what it found is for the reader, and fails the figures."""
    ran = subprocess.run([*command, *arguments], stdout=subprocess.PIPE, text=True)
    if ran.returncode not in (0, 1):
        raise SystemExit(f"the simulator has failed: {ran.stdout[-2000:]}")
    figures.told(ran.stdout.rstrip())
    return ran.stdout


def kills(quick):
    said = simulate("--points", "2" if quick else "25")
    for whose, goal, seeds in [("coordinator", 40, 25), ("device", 15, 20)]:
        points = int(re.search(rf"(\d+) points of a {whose}", said)[1])
        runs, failed = map(int, re.search(rf"kills of a {whose}: (\d+) runs, (\d+) failed", said).groups())
        figures.at_least(f"1 named points of a {whose} at which it was killed, simulated", points, goal)
        figures.at_least(f"1 such kills of a {whose}", runs, goal * (1 if quick else seeds))
        figures.exactly(f"1 runs after them that did not end as the calm run, of a {whose}", failed, 0)


def seeds(quick):
    count = 1000 if quick else 20_000
    said = simulate("--seeds", str(count))
    runs, failed, seconds = re.search(r"seeds: (\d+) runs, (\d+) failed, .* in ([\d.]+) s", said).groups()
    figures.exactly("2 seeds of faults", int(runs), count)
    figures.exactly("2 seeds that failed", int(failed), 0)
    figures.at_most("2 time per 20,000 seeds", float(seconds) / count * 20_000, 600, "s")
    differ = 0
    for seed in range(3 if quick else 20):
        first, second = re.search(r"trace (\w+), and (\w+) when", simulate("--seed", str(seed), "--hash")).groups()
        differ += first != second
    figures.exactly("2 seeds that gave another trace when they were run again", differ, 0)


def bugs():
    said = simulate("--bugs", "--seeds", "2000", command=PLANTED)
    found = int(re.search(r"bugs: (\d+) of \d+ found", said)[1])
    figures.at_least("2 planted bugs found within 2,000 seeds", found, 12)


def main():
    which, quick = sys.argv[2], "--quick" in sys.argv
    if which == "kills":
        kills(quick)
    else:
        seeds(quick)
        # They need a build of their own.
        if not quick:
            bugs()


if __name__ == "__main__":
    main()
