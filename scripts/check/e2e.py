"""Divides E2E NLG among devices, each with restaurants of its own: e2e.py TRAIN.TXT DIRECTORY DEVICE...

Writes DIRECTORY/train/<device>.jsonl and DIRECTORY/held-out/<device>.jsonl: a record's prompt is the table of a restaurant's
properties, its completion what somebody wrote about it. The corpus is shuffled by a generator of fixed seed.
"""

import json
import random
import sys
from collections import defaultdict
from pathlib import Path

TRAINED = 1600
HELD_OUT = 100


def main(corpus, directory, *devices):
    restaurants = defaultdict(list)
    for line in Path(corpus).read_text(encoding="utf-8").splitlines():
        properties, text = line.split("||")
        name = properties.split(" | ")[0]
        restaurants[name].append({"prompt": properties.strip(), "completion": f" {text.strip()}"})
    # In turn, from the one that most was written about.
    names = sorted(restaurants, key=lambda name: -len(restaurants[name]))
    for i, device in enumerate(devices):
        records = [record for name in names[i :: len(devices)] for record in restaurants[name]]
        random.Random(i).shuffle(records)
        write(Path(directory) / "train" / f"{device}.jsonl", records[:TRAINED])
        write(Path(directory) / "held-out" / f"{device}.jsonl", records[TRAINED : TRAINED + HELD_OUT])


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
