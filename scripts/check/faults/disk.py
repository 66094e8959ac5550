"""Figure 4: the run directory is on a disk of 8 MiB that fills up, and is then given room."""

import pathlib
import subprocess
import sys
import time

from federation import Site, calm, figures

ROUNDS, STEPS = 30, 20
SMALL, LARGE = "8m", "256m"
GOES_ON_S = 5


def mount(path, options):
    return subprocess.run(["mount", "-t", "tmpfs", "-o", options, "headwater", str(path)], capture_output=True).returncode == 0


def main():
    work = pathlib.Path(sys.argv[1])
    adapter, losses, _ = calm(work / "calm-disk", ROUNDS, STEPS)
    site = Site(work / "full", ROUNDS, STEPS, runs="small")
    small = site.path / "small"
    small.mkdir()
    if not mount(small, f"size={SMALL}"):
        figures.told("   only root may mount a small disk: NOT MEASURED")
        figures.exactly("4 full disk: could be tried", 0, 1)
        return
    try:
        # What the run itself needs would fit for long: something else takes the room.
        site.start_all()
        while not any(row["row"] == "round" for row in site.rows()):
            time.sleep(0.01)
        filler = small / "filler"
        with open(filler, "wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass
        until = time.monotonic() + 60
        while site.status() != "storage degraded" and time.monotonic() < until and not site.failed():
            time.sleep(0.05)
        shown = site.status() == "storage degraded"
        figures.exactly("4 full disk: \"storage degraded\" shown", int(shown), 1)
        # It waits, and loses nothing.
        time.sleep(3)
        figures.exactly("4 full disk: processes that gave up", len(site.failed()), 0)
        began = time.monotonic()
        filler.unlink()
        done = site.newest_step()
        while site.newest_step() < done + 2 and time.monotonic() - began < 60:
            time.sleep(0.01)
        figures.at_most("4 full disk: training again after there is room", time.monotonic() - began, GOES_ON_S, "s")
        subprocess.run(["mount", "-o", f"remount,size={LARGE}", str(small)], check=True)
        ended = site.wait(240)
        if not ended:
            site.tail()
        figures.exactly("4 full disk: final adapter and losses are a calm run's",
                        int(ended and site.adapter() == adapter and site.losses() == losses), 1)
    finally:
        site.kill_all()
        subprocess.run(["umount", "-l", str(small)])


if __name__ == "__main__":
    main()
