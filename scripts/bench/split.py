"""split.sh's measurements: unsplit training, a run with one participant and one with four, in turn.

    split.py --one TOML --four TOML --narrow TOML --data RECORDS.jsonl --work DIR --rounds N

The programs are found on the PATH. Rates are trained tokens per second of steps as the programs report them (computing and
waiting), without each participant's first step; where participants train side by side, in the time of the slowest.
"""

import argparse
import contextlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import figures

CORES = 2


def main():
    parser = argparse.ArgumentParser()
    for name in ("--one", "--four", "--narrow", "--data", "--work"):
        parser.add_argument(name, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    arguments = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    data = one_text(Path(arguments.data), Path(arguments.work) / "text.jsonl")

    rates = {"unsplit": [], "one": [], "four": []}
    overheads, peaks = [], []
    for turn in range(arguments.rounds):
        directory = Path(arguments.work) / f"round-{turn}"
        directory.mkdir()
        rates["unsplit"].append(unsplit(arguments.one, data, directory))
        rate, _, peak = split(arguments.one, data, directory / "one", ["press-1"])
        rates["one"].append(rate)
        peaks.append(peak)
        names = ["press-1", "mill-1", "packer-1", "chiller-1"]
        rate, overhead, _ = split(arguments.four, data, directory / "four", names)
        rates["four"].append(rate)
        overheads.append(overhead)
        shutil.rmtree(directory)
        figures.told("   tokens/s: " + ", ".join(f"{name} {values[-1]:.0f}" for name, values in rates.items()))

    *_, narrow_peak = split(arguments.narrow, data, Path(arguments.work) / "narrow", ["press-1"])

    rate = {name: statistics.median(values) for name, values in rates.items()}
    for name, value in rate.items():
        figures.noted(f"6 {name}", value, "tokens/s")
    figures.at_least("6 one participant, split / unsplit", rate["one"] / rate["unsplit"], 0.95, "x speed")
    figures.at_least("6 four participants / one", rate["four"] / rate["one"], 0.95, "x speed")
    overhead = statistics.median(overheads)
    figures.at_most("6 coordinator's CPU time that is not arithmetic, four participants", overhead, 0.05, "share")
    figures.at_most("3 peak memory of a participant, one block at each end, f32", statistics.median(peaks), 300, "MB")
    figures.at_most("3 peak memory of a participant, one block at each end, int8", narrow_peak, 150, "MB")


def one_text(records, path):
    """All records as one text: cut into sequences, all but its last one is as long as can be, and every token trains."""
    with open(records, encoding="utf-8") as file:
        text = "\n".join(f"{record['prompt']}{record['completion']}" for record in map(json.loads, file))
    path.write_text(json.dumps({"text": text}) + "\n", encoding="utf-8")
    return path


def unsplit(config, data, directory):
    command = ["participant", "train", config, "--data", data, "--name", "press-1", "--out", directory / "local", "--json"]
    printed = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
    return tokens_per_s([row for row in map(json.loads, printed.splitlines()) if row["event"] == "step"])


def split(config, data, directory, names):
    """Tokens/s, the coordinator's share of CPU time that is not arithmetic, and the largest participant in MB."""
    directory.mkdir()
    home = directory / "home"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{udp.getsockname()[1]}"
    quietly("coordinator", "init", home, "--address", address)
    command = ["coordinator", "run", config, "--home", home, "--runs", directory / "runs", "--json"]
    invitations = [directory / f"{name}.invite" for name in names]
    for name, invitation in zip(names, invitations):
        quietly("coordinator", "invite", home, name, "--out", invitation)
    with open(directory / "log", "w") as log, ThreadPoolExecutor() as pool:
        coordinator = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)

        def end_of(process):
            _, status, usage = os.wait4(process.pid, 0)
            if status:  # the others would wait for it
                coordinator.kill()
            return status, usage.ru_maxrss * 1024 / 1e6

        joins = [
            ["participant", "join", invitation, "--data", data, "--state", directory / f"{name}.state", "--patience-s", "5"]
            for name, invitation in zip(names, invitations)
        ]
        ends = [pool.submit(end_of, subprocess.Popen(join, stdout=log, stderr=log)) for join in joins]
        steps, spent = [], []
        for row in map(json.loads, coordinator.stdout):
            if row["row"] == "step":
                steps.append(row)
                spent.append(cpu_time(coordinator.pid))
        failed = coordinator.wait()
    statuses, peaks = zip(*(end.result() for end in ends))
    if failed or any(statuses):
        sys.exit(f"a party failed:\n{(directory / 'log').read_text()[-3000:]}")
    of_each = [[step for step in steps if step["participant"] == name] for name in names]
    total, arithmetic = (last - first for first, last in zip(spent[0], spent[-1]))
    return tokens_per_s(*of_each), 1 - arithmetic / total, max(peaks)


def quietly(*command):
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)


def tokens_per_s(*participants):
    steps = [sorted(rows, key=lambda row: row["step"])[1:] for rows in participants]
    slowest = max(sum(row["compute_ms"] + row["wait_ms"] for row in rows) for rows in steps)
    return sum(row["tokens"] for rows in steps for row in rows) / slowest * 1e3


def cpu_time(process):
    """Of a process in all, and of its threads that do arithmetic: they have names of their own, unlike those that serve the
    network and the first one."""

    def ticks(path):
        fields = (path / "stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])  # in user and in system mode

    arithmetic = 0
    for task in Path(f"/proc/{process}/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the thread has ended meanwhile
            if task.name != str(process) and not (task / "comm").read_text().startswith("tokio"):
                arithmetic += ticks(task)
    return ticks(Path(f"/proc/{process}")), arithmetic


if __name__ == "__main__":
    main()
