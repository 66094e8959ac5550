"""Figure 3: a run behind a relay that does what bad networks do; it must finish, with the losses of a clean run."""

import json
import os
import pathlib
import subprocess
import sys
import time

from federation import DEVICES, Site, calm, figures, free_port

ROUNDS, STEPS = 3, 10
BLACKOUT_S, REBIND_S = 10, 10

# Name, and options of the relay.
LINKS = [
    ("loss 1 %", "--loss 0.01"),
    ("loss 5 %", "--loss 0.05"),
    ("loss 20 %", "--loss 0.20"),
    ("duplication 10 %", "--duplicate 0.10"),
    ("reordering 25 %", "--reorder 0.25"),
    ("delay 10-50 ms", "--delay-ms 10-50"),
    ("delay 10-500 ms", "--delay-ms 10-500"),
    ("bit flips in 1 % of datagrams", "--flip 0.01"),
    ("blackout of 10 s", f"--delay-ms 10-20 --blackout-s 3,{BLACKOUT_S}"),
    ("another port every 10 s", f"--delay-ms 20-40 --rebind-s {REBIND_S}"),
    ("all of it at once", f"--loss 0.05 --duplicate 0.05 --reorder 0.1 --flip 0.01 --delay-ms 10-40 --rebind-s {REBIND_S} "
                          f"--blackout-s 5,{BLACKOUT_S}"),
]
QUICK = ["loss 5 %", "reordering 25 %", "bit flips in 1 % of datagrams", "blackout of 10 s"]


def main():
    work, quick = pathlib.Path(sys.argv[1]), "--quick" in sys.argv
    adapter, losses, seconds = calm(work / "clean", ROUNDS, STEPS)
    unfinished = differing = 0
    links = [link for link in LINKS if not quick or link[0] in QUICK]
    for seed, (name, options) in enumerate(links, 1):
        site = Site(work / f"link-{seed}", ROUNDS, STEPS)
        port = free_port()
        command = [os.environ["RELAY"], "--listen", f"127.0.0.1:{port}", "--to", f"127.0.0.1:{site.port}", "--seed", str(seed)]
        relay = subprocess.Popen(command + options.split(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        site.address = f"127.0.0.1:{port}"
        began = time.monotonic()
        site.start_all()
        ended = site.wait(240)
        seconds = time.monotonic() - began
        done = json.loads(relay.communicate("end\n")[0])
        met = {what: count for what, count in done.items() if count}
        same = ended and site.adapter() == adapter and site.losses() == losses
        unfinished += not ended
        differing += not same
        departures = sum(row["row"] == "departure" for row in site.rows())
        figures.told(f"   {name}: {'the same' if same else 'NOT the same'} after {seconds:.0f} s, {departures} departures, {met}")
        if not same:
            site.tail()
        site.remove()
    figures.exactly(f"3 runs of {len(links)} that did not finish", unfinished, 0)
    figures.exactly(f"3 runs of {len(links)} whose losses or adapter differ from the clean run's", differing, 0)


if __name__ == "__main__":
    main()
