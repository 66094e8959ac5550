#!/usr/bin/env bash
# Checks that nothing is lost: real processes killed at random instants, behind a bad network, with damaged files and on a
# full disk. Everything must end as a calm run ends, to the last bit.
#
#   scripts/check/faults.sh [--json] [--quick] [--only FIGURE]
#
#   1  kill -9 of the coordinator or a device at 60 random instants (--quick: 10), and, simulated, at every named point
#   2  the simulator: 20,000 seeds of faults (--quick: 1,000), the same trace twice, planted bugs that it must find
#   3  a relay that loses, doubles, reorders, delays, flips bits, goes dark and changes ports (--quick: four of eleven links)
#   4  files cut, flipped, mutated, missing and swapped; a disk that is full (needs root for a small tmpfs)
#   8  256 participants, 1,000 idle connections, 5 % loss, kills of both sides for half an hour, then 12 minutes more of
#      the same without a kill of the coordinator, whose memory is watched (--quick: a minute in all)
#
# configs/smoke.toml with more and longer rounds: no download. Minutes; --quick under five.

set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/check/figures.sh

say "== building (minutes on a fresh machine: burn)"
cargo build --release --workspace >&2
cargo build --release --workspace --example relay --example simulate --example hostile >&2
export PATH=$built:$PATH
export RELAY=$built/examples/relay SIMULATE=$built/examples/simulate HOSTILE=$built/examples/hostile

check() { python3 "scripts/check/faults/$1.py" "$work" ${quick:+--quick} "${@:2}"; }

! wanted 1 || { say "== figure 1: kills"; check kills; }
# With the model that configs/check-train.toml names, if it is here.
if wanted 1 && [ -e "$(sed -n 's/^path = "\(.*\)"/\1/p' configs/check-train.toml)" ]; then
    say "== figure 1: what it costs"
    check cost
fi
! wanted 1 || { say "== figure 1: simulated kills"; check simulator kills; }
! wanted 2 || { say "== figure 2: the simulator"; check simulator seeds; }
! wanted 3 || { say "== figure 3: a bad network"; check network; }
if wanted 4; then
    say "== figure 4: damaged files"
    cargo test --release -p storage > "$work/storage.log" 2>&1 || { cat "$work/storage.log" >&2; exit 1; }
    check damage "$work/storage.log"
    say "== figure 4: a full disk"
    check disk
fi
! wanted 8 || { say "== figure 8: load"; check load; }
