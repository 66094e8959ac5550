#!/usr/bin/env bash
# Measures what splitting costs: a run with one participant against `participant train`, and with four against one. Every
# party is a process of its own, QUIC over loopback, f32 on the wire, the real model, batches of 4 x 128 tokens.
#
#   scripts/bench/split.sh [--json] [--quick]
#
#   6  tokens/s split against unsplit and of four participants against one; the coordinator's CPU time that is not arithmetic
#   3  peak memory of a participant that holds one block at each end, in f32 and in int8
#
# All processes share two cores, and each may use both: where a participant computes, its coordinator waits. Five rounds,
# in turn, 20 minutes on two cores; nothing else should run meanwhile. --quick: two rounds of fewer steps.

set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/check/begin.sh

steps=$([ "$quick" ] && echo 4 || echo 8)
# split NAME PARTICIPANTS WEIGHTS: the experiment; prints its path.
split() {
    experiment "$1" "s/^batch_tokens = .*/batch_tokens = 512/" "s/^held_out = .*/held_out = 0.0/" \
        "s/^local_steps = .*/local_steps = $steps/" "s/^deadline_s = .*/deadline_s = 600/" "s/^cohort = .*/cohort = $2/" \
        "s/^quorum = .*/quorum = $2/" "s/^warmup_steps = .*/warmup_steps = 0/" '$a\\n[device]\nthreads = 2\nweights = "'$3'"'
}
one=$(split one 1 f32)
four=$(split four 4 f32)
narrow=$(split narrow 1 int8)
participant device-log --out "$work/data" >&2

PYTHONPATH=scripts/check python3 scripts/bench/split.py --one "$one" --four "$four" --narrow "$narrow" --data "$work/data/all.jsonl" \
    --work "$work" --rounds $([ "$quick" ] && echo 2 || echo 5)
