"""Figure 4: what a killed run left is damaged before it goes on; damage is never believed, and the run ends as a calm one."""

import pathlib
import random
import re
import shutil
import sys
import time

from federation import DEVICES, Site, calm, figures

ROUNDS, STEPS = 4, 20


def truncate(rng, path):
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def flip(rng, path):
    bits = bytearray(path.read_bytes())
    at = rng.randrange(len(bits) * 8)
    bits[at // 8] ^= 1 << (at % 8)
    path.write_bytes(bits)


def mutate(rng, path):
    bits = bytearray(path.read_bytes())
    for _ in range(rng.randrange(1, 20)):
        bits[rng.randrange(len(bits))] = rng.randrange(256)
    path.write_bytes(bits)


def remove(rng, path):
    path.unlink()


def swap(rng, path):
    """With its other generation, or the journal of another round."""
    others = [other for other in path.parent.iterdir() if other != path and other.stem == path.stem] or [
        other for other in path.parent.iterdir() if other != path and other.suffix == path.suffix
    ]
    if others:
        held = path.read_bytes()
        path.write_bytes(others[0].read_bytes())
        others[0].write_bytes(held)


def files_of(site, what):
    newest = max((path for path in site.run.glob("rounds/*/complete")), default=None)
    state = lambda name: [path for device in DEVICES for path in site.path.glob(f"{device}.device/training/{name}.?")]
    return {
        "the journal": sorted(site.run.glob("journal/*.journal"))[-1:],
        "the manifest of the newest round": [newest] if newest else [],
        "the adapter of the newest round": [newest.parent / "adapter/adapter_model.safetensors"] if newest else [],
        "the optimizers of the newest round": [newest.parent / "state.safetensors"] if newest else [],
        "a device's newest step": state("step"),
        "a device's round starts": state("start"),
    }[what]


def interrupted(path):
    """A run in its third round, when everybody was killed."""
    site = Site(path, ROUNDS, STEPS)
    site.start_all()
    while not any(row["row"] == "step" and row["step"] >= 2 * STEPS + 5 for row in site.rows()):
        if site.failed() or site.is_over():
            raise SystemExit("the run was over before it could be interrupted")
        time.sleep(0.002)
    site.kill_all()
    return site


def main():
    work, quick = pathlib.Path(sys.argv[1]), "--quick" in sys.argv
    log = pathlib.Path([argument for argument in sys.argv[2:] if not argument.startswith("--")][0]).read_text()
    exhaustive = ["cut_anywhere_it_ends", "no_flipped_bit_is_believed", "no_mutation_is_believed", "swapped_generations",
                  "damage_anywhere_falls_back", "records_that_were_swapped", "a_failing_disk_loses_nothing", "a_failing_disk_keeps"]
    passed = sum(bool(re.search(rf"{name}\w* \.\.\. ok", log)) for name in exhaustive)
    figures.exactly("4 exhaustive tests of journal and snapshot passed (cut at every byte, every bit, 10,000 mutations, EIO)",
                    passed, len(exhaustive))
    adapter, _, _ = calm(work / "calm-damage", ROUNDS, STEPS)
    template = interrupted(work / "interrupted")
    targets = ["the journal", "the manifest of the newest round", "the adapter of the newest round",
               "the optimizers of the newest round", "a device's newest step", "a device's round starts"]
    cases = [(target, damage) for damage in [truncate, flip, mutate, remove, swap] for target in targets
             if not (damage is swap and "round" in target and "device" not in target)]
    rng = random.Random(4)
    if quick:
        cases = [("the journal", flip), ("the adapter of the newest round", mutate), ("the manifest of the newest round", remove),
                 ("a device's newest step", swap), ("a device's newest step", truncate)]
    different = panics = unfinished = 0
    for number, (target, damage) in enumerate(cases):
        copy = work / f"damaged-{number}"
        shutil.copytree(template.path, copy)
        site = object.__new__(Site)
        site.__dict__.update(template.__dict__, path=copy, parties={}, starts={}, read_bytes=0)
        files = files_of(site, target)
        damage(rng, rng.choice(files))
        site.start_all()
        ended = site.wait(120)
        unfinished += not ended
        different += site.adapter() != adapter
        panicked = any("panicked" in log.read_text(errors="replace") for log in copy.glob("*.log"))
        panics += panicked
        if not ended or panicked or site.adapter() != adapter:
            figures.told(f"   {damage.__name__} {target}: ended {ended}, the same {site.adapter() == adapter}")
            site.tail()
        site.remove()
    figures.noted("4 runs gone on with from damaged files", len(cases))
    figures.exactly("4 panics", panics, 0)
    figures.exactly("4 runs that did not finish", unfinished, 0)
    figures.exactly("4 runs whose adapter differs from the calm run's", different, 0)


if __name__ == "__main__":
    main()
