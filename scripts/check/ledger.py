"""The byte ledger against QUIC's own count: ledger.py REPORT.json

The ledger counts what the protocol writes, by kind of message. What QUIC adds (headers, acknowledgements, encryption) is
expected from its counts of datagrams and frames; both together should be the bytes of its datagrams, for every
participant in each direction.
"""

import json
import sys

import figures


def main(report):
    with open(report, encoding="utf-8") as file:
        participants = json.load(file)["participants"]
    gaps = []
    for participant in participants:
        traffic = participant["traffic"]
        for direction in ("down_bytes", "up_bytes"):
            ledger = sum(kind[direction] for kind in traffic["by_kind"].values())
            overhead, udp = traffic["overhead"][direction], traffic["udp"][direction]
            gaps.append(100 * abs(ledger + overhead - udp) / udp)
            figures.told(
                f"   {participant['name']:12}{direction:12}{ledger:12} ledger + {overhead:9} expected overhead,"
                f" {udp:12} in datagrams: {gaps[-1]:.3f} %"
            )
    if not any(gaps):
        raise SystemExit("no gap at all: there was no traffic, or the overhead is just what was left, which proves nothing")
    figures.at_most("8 ledger against datagrams, largest gap", max(gaps), 1.0, "%")


if __name__ == "__main__":
    main(*sys.argv[1:])
