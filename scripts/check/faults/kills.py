"""Figure 1: processes are killed at random instants until a run is over; it must end as a calm one does."""

import json
import pathlib
import random
import sys
import time

from federation import DEVICES, Site, calm, figures

ROUNDS, STEPS = 30, 40
TRAINING_AGAIN_S = 5


def kill_until_over(site, rng, kills_max):
    """Kills somebody, starts it again, waits until somebody trains, and so on. Returns the seconds until they did."""
    site.start_all()
    waits, before, restarted = [], -1, None
    while not site.is_over():
        # What was under way at the kill may still be reported: everybody has to do a step that nobody had begun.
        began = time.monotonic()
        while site.newest_step() < before + 2 and not site.is_over():
            if site.failed() or time.monotonic() - began > 90:
                site.tail()
                return [wait for wait in waits if wait is not None] + [time.monotonic() - began]
            time.sleep(0.005)
        if waits and waits[-1] is None and not site.is_over():
            waits[-1] = time.monotonic() - restarted
        if len(waits) == kills_max:
            site.wait(300)
            break
        # Long enough for some steps, at any instant of one.
        time.sleep(rng.uniform(0, 0.25))
        victims = [name for name, party in site.parties.items() if party.poll() is None]
        if site.is_over() or not victims:
            break
        victim = rng.choice(victims)
        site.kill(victim)
        before = max(site.newest_step(), *site.newest.values())
        # Now and then somebody else is killed before the first is back.
        if rng.random() < 0.1 and len(victims) > 1:
            other = rng.choice([name for name in victims if name != victim])
            site.kill(other)
            site.start(other)
        time.sleep(rng.uniform(0, 0.1))
        site.start(victim)
        restarted = time.monotonic()
        waits.append(None)
    site.wait(90)
    return [wait for wait in waits if wait is not None]


def steps_computed(site):
    """How often each device has finished each step, over all its processes."""
    computed = {}
    for device in DEVICES:
        for line in (site.path / f"{device}.out").read_text(errors="replace").splitlines():
            # A process that was killed may have left half a line, and the next one's behind it.
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if event.get("event") == "step":
                key = (device, event["step"])
                computed[key] = computed.get(key, 0) + 1
    return computed


def main():
    work, quick = pathlib.Path(sys.argv[1]), "--quick" in sys.argv
    wanted = 10 if quick else 60
    adapter, losses, seconds = calm(work / "calm", ROUNDS, STEPS)
    figures.told(f"   the calm run: {len(losses)} steps in {seconds:.1f} s")
    kills, waits, different, differing_losses, errors, repeated, twice = 0, [], 0, 0, 0, 0, 0
    lost_rounds, miscounted = 0, 0
    seed = 0
    while kills < wanted:
        seed += 1
        site = Site(work / f"killed-{seed}", ROUNDS, STEPS)
        waits += kill_until_over(site, random.Random(seed), wanted - kills)
        count = sum(site.starts.values()) - 3
        kills += count
        rows = site.rows()
        finished = [row["round"] for row in rows if row["row"] == "round"]
        errors += len(site.failed())
        different += site.adapter() != adapter
        found = site.losses()
        differing_losses += sum(found.get(key) != loss for key, loss in losses.items())
        lost_rounds += ROUNDS - sum((site.run / f"rounds/{n:04}/complete").exists() for n in range(1, ROUNDS + 1))
        miscounted += sum(finished.count(n) != 1 for n in range(1, ROUNDS + 1))
        accepted = [(r["round"], r["participant"]) for r in rows if r["row"] == "update" and r["accepted"]]
        twice += len(accepted) - len(set(accepted))
        computed = steps_computed(site)
        repeated = max([repeated] + [sum(n - 1 for (d, _), n in computed.items() if d == device) / max(count, 1)
                                     for device in DEVICES])
        figures.told(f"   run {seed}: {count} kills, {len(finished)} rounds, worst wait {max(waits):.2f} s")
        if site.adapter() != adapter or site.failed():
            site.tail()
            break
        site.remove()
    figures.at_least("1 kills of real processes", kills, wanted)
    figures.exactly("1 rounds lost", lost_rounds, 0)
    figures.exactly("1 rounds without a row, or with two", miscounted, 0)
    figures.exactly("1 updates applied twice", twice, 0)
    figures.exactly("1 runs whose final adapter differs from a calm run's", different, 0)
    figures.exactly("1 losses that differ from a calm run's", differing_losses, 0)
    figures.exactly("1 survivors with an error", errors, 0)
    figures.at_most("1 steps a device repeated per kill", repeated, 1)
    figures.at_most("1 training again after a restart, worst", max(waits, default=float("nan")), TRAINING_AGAIN_S, "s")
    figures.noted("1 training again after a restart, median", sorted(waits)[len(waits) // 2], "s")


if __name__ == "__main__":
    main()
