"""Figures 5 and 6: what peers that mean harm cost those that do not. `peers.py DIR revoke|crowd|one [--quick]`

A crowd: 1,000 handshakes begun and never finished, and 50 participants that say one byte a second. One: a participant that is wrong in one way.
Both besides an honest run. The attackers run at the lowest priority (nice 19): elsewhere they would compute on machines of their own.
Needs the standard library only, and `hostile` (shared/net/examples) where $HOSTILE says.
"""

import json
import os
import pathlib
import statistics
import subprocess
import sys
import threading
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "faults"))
from federation import DEVICES, Site, calm, figures

MIB = 1 << 20
HALF, SLOW = 1000, 50
STEP_COST, CROWD_MIB, PEER_MIB, REVOKED_S = 0.10, 64, 24, 5
# Close codes of PROTOCOL.md, section 6.
KINDS = {"length": 0x13, "payload": 0x11, "nan": 0x14, "infinity": 0x14, "1e38": 0x14, "stale": 0x12, "shape": 0x12,
         "churn": 0x13, "gaps": 0x15}


class Memory(threading.Thread):
    """The largest resident memory of a process, in bytes, since the last time it was asked."""

    def __init__(self, process):
        super().__init__(daemon=True)
        self.path, self.largest, self.lock = pathlib.Path(f"/proc/{process.pid}/statm"), 0, threading.Lock()
        self.start()

    def now(self):
        return int(self.path.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def run(self):
        while True:
            try:
                now = self.now()
            except (OSError, IndexError):
                return
            with self.lock:
                self.largest = max(self.largest, now)
            time.sleep(0.02)

    def taken(self):
        with self.lock:
            largest, self.largest = self.largest, 0
        return largest


def attack(*arguments, cwd, out):
    command = ["nice", "-n", "19", os.environ["HOSTILE"], *map(str, arguments)]
    return subprocess.Popen(command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)


def steps(site):
    """Time of the round and time of the coordinator's clock do not matter: milliseconds of every step so far, in order."""
    return [row["compute_ms"] + row["wait_ms"] for row in site.rows() if row["row"] == "step"]


def crowd(work, quick):
    windows, seconds = (3, 10) if quick else (8, 20)
    # The steps of the smoke run take a few milliseconds: these take as long as those of a real model.
    site = Site(work / "crowd", rounds=1, steps=100_000)
    toml = site.path / "experiment.toml"
    text = toml.read_text().replace("width = 64", "width = 256").replace("ffn = 176", "ffn = 704")
    text = text.replace("sequence_tokens_max = 128", "sequence_tokens_max = 256").replace("batch_tokens = 256", "batch_tokens = 512")
    toml.write_text(text.replace("deadline_s = 600", "deadline_s = 86400"))
    site.call(f"coordinator invite home slow --count {SLOW} --out slow")
    site.start_all()
    while site.newest_step() < 3:
        if site.failed():
            site.tail()
            raise SystemExit("the honest run has failed")
        time.sleep(0.05)
    memory = Memory(site.parties["coordinator"])
    address = f"127.0.0.1:{site.port}"
    invitations = [f"slow/slow-{i}.invite" for i in range(1, SLOW + 1)]
    calm_ms, attacked_ms, calm_bytes, attacked_bytes, ratios = [], [], 0, 0, []
    for window in range(windows):
        medians = {}
        for is_attacked in (False, True):
            attackers = []
            if is_attacked:
                out = open(site.path / "attackers.log", "ab")
                attackers = [attack("half", address, HALF, cwd=site.path, out=out),
                             attack("slow", address, "slow-state", *invitations, cwd=site.path, out=out)]
            # Until all of the crowd is there, or what the last one left is over.
            time.sleep(6)
            if any(attacker.poll() is not None for attacker in attackers):
                raise SystemExit(f"an attacker has ended: {(site.path / 'attackers.log').read_text()[-500:]}")
            if not is_attacked:
                memory.taken()
            before = len(steps(site))
            time.sleep(seconds)
            measured = steps(site)[before:]
            largest = memory.taken()
            for attacker in attackers:
                attacker.kill()
                attacker.wait()
            medians[is_attacked] = statistics.median(measured)
            if is_attacked:
                attacked_ms, attacked_bytes = attacked_ms + measured, max(attacked_bytes, largest)
            else:
                calm_ms, calm_bytes = calm_ms + measured, max(calm_bytes, largest)
        ratios.append(medians[True] / medians[False])
        figures.told(f"   window {window + 1}: {medians[False]:.1f} ms calm, {medians[True]:.1f} ms attacked")
    failed = site.failed()
    site.kill_all()
    figures.told(f"   {len(calm_ms)} steps calm, {len(attacked_ms)} attacked; {calm_bytes / MIB:.0f} and {attacked_bytes / MIB:.0f} MiB")
    figures.exactly("6 crowd: honest parties that gave up", len(failed), 0)
    figures.at_most("6 crowd: time of an honest step, median of interleaved windows", statistics.median(ratios), 1 + STEP_COST, "x calm")
    figures.at_most("6 crowd: memory of the coordinator", (attacked_bytes - calm_bytes) / MIB, CROWD_MIB, "MiB more")


def one(work, quick):
    rounds, length = 2, 1500
    adapter, losses, seconds = calm(work / "calm-peers", rounds, length)
    kinds = list(KINDS)
    site = Site(work / "one", rounds, length)
    for kind in kinds + ["unread"]:
        site.call(f"coordinator invite home {kind}")
    site.start_all()
    while site.newest_step() < 3:
        time.sleep(0.02)
    memory, address, said = Memory(site.parties["coordinator"]), f"127.0.0.1:{site.port}", {}
    worst, codes = {}, {}
    for kind in kinds:
        memory.taken()
        before = memory.now()
        with open(site.path / f"{kind}.out", "wb") as out:
            status = attack(kind, address, "state", f"{kind}.invite", cwd=site.path, out=out).wait()
        worst[kind] = (memory.taken() - before) / MIB
        text = (site.path / f"{kind}.out").read_text(errors="replace").strip()
        said[kind] = json.loads(text.splitlines()[-1]) if status == 0 else {"code": -1, "reason": text[-200:], "seconds": 0}
        codes[kind] = said[kind]["code"]
        figures.told(f"   {kind}: {codes[kind]:#04x} after {said[kind]['seconds']:.1f} s, {worst[kind]:+.1f} MiB: {said[kind]['reason']}")
        if site.is_over():
            figures.told("   the honest run was over before")
            break
    # It takes what it is given, and never reads: nothing is wrong with that but what it costs.
    memory.taken()
    before = memory.now()
    with open(site.path / "unread.out", "wb") as out:
        unread = attack("unread", address, "state", "unread.invite", cwd=site.path, out=out)
        time.sleep(5)
        worst["unread"] = (memory.taken() - before) / MIB
        unread.kill()
        unread.wait()
    figures.told(f"   unread: {worst['unread']:+.1f} MiB")
    during = not site.is_over()
    ended = site.wait(300)
    if not ended:
        site.tail()
    right = sum(codes.get(kind) == KINDS[kind] and bool(said[kind]["reason"]) for kind in kinds)
    figures.exactly("6 one hostile peer: kinds closed with their own code and a reason", right, len(kinds))
    figures.exactly("6 one hostile peer: the honest run went on all the while", int(during), 1)
    figures.at_most("6 one hostile peer: memory for its connection, worst kind", max(worst.values()), PEER_MIB, "MiB")
    figures.exactly("6 one hostile peer: adapter and losses are a calm run's, bit for bit",
                    int(ended and site.adapter() == adapter and site.losses() == losses), 1)


def revoke(work, quick):
    site = Site(work / "revoke", rounds=1, steps=100_000)
    site.start_all()
    while site.newest_step() < 3:
        time.sleep(0.02)
    name = DEVICES[0]
    began = time.monotonic()
    site.call(f"coordinator revoke home {name}")
    while site.parties[name].poll() is None and time.monotonic() - began < 60:
        time.sleep(0.01)
    figures.at_most("5 revoked: a device that trains is cut off after", time.monotonic() - began, REVOKED_S, "s")

    def told(party):
        return party.wait(timeout=60) == 1 and "revoked" in (site.path / f"{name}.log").read_text()

    refused = told(site.parties[name])
    site.start(name)
    refused += told(site.parties[name])
    site.kill("coordinator")
    site.start("coordinator")
    time.sleep(2)
    site.start(name)
    refused += told(site.parties[name])
    figures.exactly("5 revoked: told so when cut off, when it comes again, and after a restart", int(refused), 3)
    verified = json.loads(site.call("coordinator audit-log verify home --json"))
    shown = [json.loads(line)["event"] for line in site.call("coordinator audit-log show home --json").splitlines()]
    expected = {"home_made", "invited", "enrolled", "joined", "revoked", "refused", "run_started"}
    figures.exactly("5 audit log: verified, with every kind of event", int(verified["lines"] == len(shown) and expected <= set(shown)), 1)
    log = site.path / "home/audit.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    forgeries = [lines[:i] + lines[i + 1:] for i in range(len(lines))]
    forgeries += [lines[:i] + [lines[i].replace(name, "nobody")] + lines[i + 1:] for i in range(len(lines)) if name in lines[i]]
    forgeries += [lines[:i] + [lines[i + 1], lines[i]] + lines[i + 2:] for i in range(len(lines) - 1)]
    noticed = 0
    for forgery in forgeries:
        log.write_text("".join(forgery))
        noticed += subprocess.run(["coordinator", "audit-log", "verify", "home"], cwd=site.path, capture_output=True).returncode == 1
    log.write_text("".join(lines))
    figures.exactly("5 audit log: lines removed, changed and swapped that are noticed", noticed, len(forgeries))
    site.kill_all()


if __name__ == "__main__":
    {"crowd": crowd, "one": one, "revoke": revoke}[sys.argv[2]](pathlib.Path(sys.argv[1]), "--quick" in sys.argv)
