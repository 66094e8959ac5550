"""A coordinator and two devices as processes, to be killed, cut off and started again, and what a run of theirs left.

Needs the standard library only.
"""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))
import figures

DEVICES = ["mill-1", "press-1"]
SMOKE = pathlib.Path(__file__).parents[3] / "configs/smoke.toml"


class Site:
    """A directory with a home, two invitations and the devices' records. `parties` are the running processes."""

    def __init__(self, path, rounds, steps, runs="runs"):
        self.path, self.rounds, self.runs = pathlib.Path(path), rounds, runs
        self.path.mkdir(parents=True)
        text = SMOKE.read_text().replace("rounds = 2", f"rounds = {rounds}")
        text = text.replace("local_steps = 5", f"local_steps = {steps}").replace("deadline_s = 60", "deadline_s = 600")
        (self.path / "experiment.toml").write_text(text)
        self.port = free_port()
        self.call("participant device-log --out data --records 40")
        self.call(f"coordinator init home --address 127.0.0.1:{self.port}")
        for device in DEVICES:
            self.call(f"coordinator invite home {device}")
        self.parties, self.starts, self.address = {}, {}, None
        self.read_bytes, self.newest = 0, dict.fromkeys(DEVICES, -1)

    def call(self, command):
        done = subprocess.run(command.split(), cwd=self.path, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"`{command}` failed: {done.stderr}")
        return done.stdout

    def start(self, name):
        """Starts the coordinator or a device, for the first time or again."""
        if name == "coordinator":
            command = f"coordinator run experiment.toml --home home --runs {self.runs}"
        else:
            command = f"participant join {name}.invite --data data/{name}.jsonl --json"
            if self.address:
                command += f" --address {self.address}"
        self.starts[name] = self.starts.get(name, 0) + 1
        out = open(self.path / f"{name}.out", "ab")
        log = open(self.path / f"{name}.log", "ab")
        environment = dict(os.environ, HEADWATER_CACHE=str(self.path / "cache"))
        self.parties[name] = subprocess.Popen(
            command.split(), cwd=self.path, stdin=subprocess.DEVNULL, stdout=out, stderr=log, env=environment
        )

    def start_all(self):
        for name in ["coordinator"] + DEVICES:
            self.start(name)

    def kill(self, name):
        """kill -9: nothing is closed, flushed or said."""
        self.parties[name].send_signal(signal.SIGKILL)
        self.parties[name].wait()

    def kill_all(self):
        for name in self.parties:
            if self.parties[name].poll() is None:
                self.kill(name)

    def failed(self):
        """Those that have ended with an error of their own."""
        return [name for name, party in self.parties.items() if party.poll() not in (None, 0, -signal.SIGKILL)]

    def is_over(self):
        return self.parties["coordinator"].poll() == 0

    def wait(self, seconds):
        """Until the run is over, and everybody has gone home."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self.failed():
                return False
            if all(party.poll() == 0 for party in self.parties.values()):
                return True
            time.sleep(0.05)
        return False

    @property
    def run(self):
        return self.path / self.runs / "smoke"

    def rows(self):
        path = self.run / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def newest_step(self):
        """The newest step that every device has reported; -1 before the first."""
        path = self.run / "metrics.jsonl"
        if path.exists():
            with open(path, "rb") as file:
                file.seek(self.read_bytes)
                new = file.read()
            new = new[: new.rfind(b"\n") + 1]
            self.read_bytes += len(new)
            for row in map(json.loads, new.splitlines()):
                if row["row"] == "step":
                    self.newest[row["participant"]] = max(row["step"], self.newest[row["participant"]])
        return min(self.newest.values())

    def adapter(self):
        path = self.run / f"rounds/{self.rounds:04}/adapter/adapter_model.safetensors"
        return path.read_bytes() if path.exists() else None

    def losses(self):
        """Of every step and device; None where two rows disagree."""
        losses = {}
        for row in self.rows():
            if row["row"] == "step":
                key, loss = (row["step"], row["participant"]), (row["loss_nats"], row["tokens"])
                if losses.setdefault(key, loss) != loss:
                    losses[key] = None
        return losses

    def status(self):
        try:
            return json.loads((self.run / "status.json").read_text())["state"]
        except (OSError, ValueError, KeyError):
            return ""

    def tail(self):
        for log in sorted(self.path.glob("*.log")):
            lines = log.read_text(errors="replace").splitlines()[-8:]
            figures.told(f"{log.name}:\n  " + "\n  ".join(lines))

    def remove(self):
        self.kill_all()
        shutil.rmtree(self.path)


def calm(path, rounds, steps):
    """What the run leaves when nothing happens to it: the final adapter, the losses, and how long it took."""
    site = Site(path, rounds, steps)
    began = time.monotonic()
    site.start_all()
    if not site.wait(600):
        site.tail()
        raise SystemExit("the calm run has failed")
    return site.adapter(), site.losses(), time.monotonic() - began


def free_port():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.bind(("127.0.0.1", 0))
        return udp.getsockname()[1]
