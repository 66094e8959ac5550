"""What durability costs: the time that journal and snapshots take, against that of the steps, with the real model."""

import os
import pathlib
import re
import subprocess
import sys

from federation import figures, free_port

STEPS = 12


def took(log):
    return [float(ms) for ms in re.findall(r"took_ms=([\d.e-]+)", pathlib.Path(log).read_text())]


def main():
    work = pathlib.Path(sys.argv[1]) / "cost"
    work.mkdir()
    root = pathlib.Path(__file__).parents[3]
    text = re.sub(r"(?m)^local_steps = .*", f"local_steps = {STEPS}", (root / "configs/check-train.toml").read_text())
    (work / "cost.toml").write_text(text)
    call = lambda command: subprocess.run(command.split(), cwd=root, check=True, capture_output=True)
    call(f"participant device-log --out {work}/data --records 100")
    call(f"coordinator init {work}/home --address 127.0.0.1:{free_port()}")
    call(f"coordinator invite {work}/home press-1 --out {work}/press-1.invite")
    environment = dict(os.environ, RUST_LOG="coordinator=debug,participant=debug")
    commands = {
        "coordinator": f"coordinator run {work}/cost.toml --home {work}/home --runs {work}/runs",
        "device": f"participant join {work}/press-1.invite --data {work}/data/press-1.jsonl --json",
    }
    parties = [subprocess.Popen(command.split(), cwd=root, env=environment, stdout=open(work / f"{name}.out", "wb"),
                                stderr=open(work / f"{name}.log", "wb")) for name, command in commands.items()]
    if any(party.wait(300) for party in parties):
        raise SystemExit("a party failed")
    events = re.findall(r'"compute_ms":([\d.e-]+).*?"wait_ms":([\d.e-]+)', (work / "device.out").read_text())
    step_ms = sum(float(compute) + float(wait) for compute, wait in events) / len(events)
    # Commits are what a step waits for; what a device keeps is written while it computes.
    journal_ms = sum(took(work / "coordinator.log")) / len(events)
    keep_ms = sum(took(work / "device.log")) / len(events)
    figures.noted("1 a step", step_ms, "ms")
    figures.noted("1 the device's snapshot, beside the step", keep_ms, "ms")
    figures.at_most("1 the journal's part of a step", 100 * journal_ms / step_ms, 3, "%")


if __name__ == "__main__":
    main()
