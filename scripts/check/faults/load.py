"""Figure 8: 256 participants in swarms and 1,000 idle connections on one coordinator, behind a relay that loses 5 %, while participants
are killed all the time and the coordinator now and then.

The load lasts $LOAD_MINUTES (30; --quick: 80 seconds), the coordinator is killed every $LOAD_KILL_EVERY_S seconds (300; --quick: once,
after 15). Then the last coordinator is left alive under the same load for $LOAD_STEADY_MINUTES (12; --quick: none): what its memory does
in its first five minutes is warming up, a few MiB more than noise, and lives of five minutes end there.
"""

import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

from federation import Site, figures, free_port

SWARMS, EACH, IDLE = 32, 8, 1000
QUORUM = 192
LOSS = 0.05
CHURN_PER_MINUTE = 0.10
# What a coordinator's memory does in the first part of its life is warming up; what lives that end soon show behind the first part of
# that is printed.
WARM_S, PRINT_WARM_S, QUICK_WARM_S = 300, 90, 40
QUICK_LOAD_S, QUICK_FIRST_KILL_S = 80, 15
SLOPE_MIB_PER_HOUR = 30
START_S, BACK_TO_BASE_S = 120, 60
# Sockets, and whatever is open for as long as a round is.
OPEN_ROUND_FILES = 2


class Load(Site):
    def __init__(self, path):
        super().__init__(path, rounds=100_000, steps=5)
        toml = self.path / "experiment.toml"
        text = toml.read_text()
        for name, value in {"cohort": SWARMS * EACH, "quorum": QUORUM, "batch_tokens": 64, "sequence_tokens_max": 64,
                            "evaluate_every": 10}.items():
            text = re.sub(rf"(?m)^{name} = .*", f"{name} = {value}", text)
        toml.write_text(text)
        self.call("participant device-log --out data --records 400")
        for swarm in self.swarms():
            self.call(f"coordinator invite home {swarm} --count {EACH} --out invites/{swarm}")
        self.call(f"coordinator invite home idle --count {IDLE} --out idle")
        self.address, self.killed = f"127.0.0.1:{free_port()}", 0

    def swarms(self):
        return [f"swarm{n:02}" for n in range(SWARMS)]

    def start(self, name):
        if not name.startswith("swarm"):
            return super().start(name)
        command = f"participant swarm experiment.toml --count {EACH} --data data/all.jsonl --invites invites/{name} --address {self.address}"
        environment = dict(os.environ, HEADWATER_CACHE=str(self.path / "cache"))
        log = open(self.path / f"{name}.log", "ab")
        self.parties[name] = subprocess.Popen(command.split(), cwd=self.path, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                              stderr=log, env=environment)

    def standing(self):
        try:
            return json.loads((self.run / "status.json").read_text())
        except (OSError, ValueError):
            return {}

    def finished(self):
        return sum(1 for _ in self.run.glob("rounds/*/complete"))

    def held(self):
        """Memory in MiB, open files, and tasks of the coordinator, as it says."""
        process = pathlib.Path(f"/proc/{self.parties['coordinator'].pid}")
        pages = int((process / "statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20), len(list((process / "fd").iterdir())), self.standing().get("tasks", -1)

    def until(self, what, seconds, complaint):
        until = time.monotonic() + seconds
        while not what():
            if self.failed() or time.monotonic() > until:
                self.tail()
                raise SystemExit(f"{complaint} after {seconds:.0f} s; failed: {self.failed()}")
            time.sleep(0.2)


def slope_mib_per_hour(samples):
    """By least squares."""
    if len(samples) < 10:
        return float("nan")
    mean_s = sum(s for s, _ in samples) / len(samples)
    mean_mib = sum(mib for _, mib in samples) / len(samples)
    above = sum((s - mean_s) * (mib - mean_mib) for s, mib in samples)
    return 3600 * above / sum((s - mean_s) ** 2 for s, _ in samples)


def main():
    work, quick = pathlib.Path(sys.argv[1]), "--quick" in sys.argv
    load_s = 60 * float(os.environ.get("LOAD_MINUTES", QUICK_LOAD_S / 60 if quick else 30))
    kill_every_s = float(os.environ.get("LOAD_KILL_EVERY_S", load_s if quick else 300))
    steady_s = 60 * float(os.environ.get("LOAD_STEADY_MINUTES", 0 if quick else 12))
    rng = random.Random(8)
    began = time.monotonic()
    site = Load(work / "load")
    figures.told(f"   {SWARMS * EACH + IDLE} invitations after {time.monotonic() - began:.0f} s")
    site.start("coordinator")
    site.until(lambda: "tasks" in site.standing(), 30, "no coordinator")
    time.sleep(1.5)
    base = site.held()
    relay_port = site.address.split(":")[1]
    relay = subprocess.Popen([os.environ["RELAY"], "--listen", f"127.0.0.1:{relay_port}", "--to", f"127.0.0.1:{site.port}", "--seed", "8",
                              "--loss", str(LOSS)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    invitations = [f"idle/idle-{n}.invite" for n in range(1, IDLE + 1)]
    idle = subprocess.Popen([os.environ["HOSTILE"], "idle", site.address, "idle-state", *invitations], cwd=site.path,
                            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=open(site.path / "idle.log", "wb"))
    try:
        began = time.monotonic()
        site.until(lambda: site.standing().get("connections", 0) >= IDLE, START_S, "not all idle peers are connected")
        figures.told(f"   {IDLE} idle connections after {time.monotonic() - began:.0f} s, {site.held()[0]:.0f} MiB")
        for swarm in site.swarms():
            site.start(swarm)
        site.until(lambda: site.finished() >= 1, START_S, "no round is finished")
        figures.told(f"   the first round after {time.monotonic() - began:.0f} s, {site.held()[0]:.0f} MiB")
        measure(site, rng, load_s, steady_s, kill_every_s, quick)
        lost = json.loads(relay.communicate("end\n")[0])
        figures.noted("8 datagrams that were lost", 100 * lost["lost"] / (lost["lost"] + lost["passed"]), "%")
        for name in site.swarms():
            site.kill(name)
        idle.kill()
        idle.wait()
        began, now = time.monotonic(), site.held()
        while time.monotonic() - began < BACK_TO_BASE_S:
            now = site.held()
            if now[2] <= base[2] and now[1] <= base[1] + OPEN_ROUND_FILES:
                break
            time.sleep(0.5)
        figures.noted("8 back to base after", time.monotonic() - began, "s")
        figures.at_most("8 open files above those before the load", now[1] - base[1], OPEN_ROUND_FILES)
        figures.at_most("8 tasks above those before the load", now[2] - base[2], 0)
        site.parties["coordinator"].send_signal(signal.SIGINT)
        site.parties["coordinator"].wait(60)
    finally:
        for process in (relay, idle):
            if process.poll() is None:
                process.kill()
        site.kill_all()
    rows = site.rows()
    rounds = [row for row in rows if row["row"] == "round"]
    numbers = [row["round"] for row in rounds]
    kept = {int(path.parent.name) for path in site.run.glob("rounds/*/complete")}
    accepted = [(row["round"], row["participant"]) for row in rows if row["row"] == "update" and row["accepted"]]
    figures.exactly("8 rounds lost", len(set(range(1, max(numbers) + 1)) ^ set(numbers) | set(numbers) - kept), 0)
    figures.exactly("8 rounds that were made twice", len(numbers) - len(set(numbers)), 0)
    figures.exactly("8 updates applied twice", len(accepted) - len(set(accepted)), 0)
    figures.noted("8 updates of a round, mean", sum(len(row["members"]) for row in rounds) / len(rounds), f"of {SWARMS * EACH}")


def measure(site, rng, load_s, steady_s, kill_every_s, quick):
    began = time.monotonic()
    next_kill, next_churn = began + (QUICK_FIRST_KILL_S if quick else kill_every_s), began
    # Of each coordinator: seconds since its start (the first: since the load began), and MiB.
    lives, life_began, first = [[]], began, site.finished()
    kills = churned = 0
    waits, restarted, before = [], None, 0
    gave_up = connected = most_files = 0
    while (now := time.monotonic()) < began + load_s + steady_s:
        if now >= next_churn:
            next_churn += 60 / (CHURN_PER_MINUTE * SWARMS)
            name = rng.choice(site.swarms())
            gave_up += site.parties[name].poll() is not None
            site.kill(name)
            site.start(name)
            churned += EACH
        if now >= next_kill and next_kill < began + load_s - 10:
            next_kill += kill_every_s
            before = site.finished()
            site.kill("coordinator")
            site.start("coordinator")
            kills, restarted, life_began = kills + 1, now, now
            lives.append([])
        if restarted and site.finished() > before:
            waits.append(now - restarted)
            restarted = None
        try:
            mib, files, _ = site.held()
        except OSError:
            continue
        most_files, connected = max(most_files, files), max(connected, site.standing().get("connections", 0))
        lives[-1].append((now - life_began, mib))
        time.sleep(1)
    gave_up += len(site.failed())
    for kind, lines in complaints(site).items():
        figures.told(f"   {lines} times: {kind}")
    finished = site.finished() - first
    warm_s = QUICK_WARM_S if quick else PRINT_WARM_S
    for samples in lives:
        if warm := [mib for s, mib in samples if s >= warm_s]:
            figures.told(f"   a coordinator's memory: {warm[0]:.0f} MiB after {warm_s} s, {warm[-1]:.0f} after {samples[-1][0]:.0f}")
    figures.noted("8 minutes under load", (load_s + steady_s) / 60, "min")
    figures.at_least("8 connections at once", connected, SWARMS * EACH + IDLE)
    figures.noted("8 participants killed", churned)
    figures.noted("8 coordinator kills", kills)
    figures.at_least("8 rounds finished under load", finished, 1)
    figures.exactly("8 processes that gave up", gave_up, 0)
    figures.noted("8 the next round finished after a kill of the coordinator, worst", max(waits, default=float("nan")), "s")
    if quick:
        # A minute says little of an hour.
        figures.noted("8 memory after warm-up, slope", slope_mib_per_hour([sample for sample in lives[-1] if sample[0] >= warm_s]), "MiB/h")
    else:
        slope = slope_mib_per_hour([sample for sample in lives[-1] if sample[0] >= WARM_S])
        figures.at_most("8 memory after warm-up, slope", slope, SLOPE_MIB_PER_HOUR, "MiB/h")


def complaints(site):
    """What the participants' logs complain of, without names and numbers."""
    counts = {}
    for log in site.path.glob("*.log"):
        for line in log.read_text(errors="replace").splitlines():
            if " WARN " in line or " ERROR " in line or line.startswith("error"):
                kind = re.sub(r"\d+", "N", re.sub(r"\x1b\[[0-9;]*m", "", line))[28:160]
                counts[kind] = counts.get(kind, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1])[:12])


if __name__ == "__main__":
    main()
