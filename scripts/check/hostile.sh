#!/usr/bin/env bash
# Checks that no one gets in, and that who is in does no harm: wrong identities, peers that mean harm, bytes that lie.
#
#   scripts/check/hostile.sh [--json] [--quick] [--only FIGURE]
#
#   5  the handshake matrix over real QUIC; invitations used twice at once; a device revoked; a forged audit log
#   6  1,000 half handshakes and 50 peers at a byte a second beside an honest run; one hostile participant; a slow reader
#   7  a million mutated inputs for every decoder of foreign bytes, ten million for GGUF files, under an allocator that counts
#
# --quick: under five minutes, with 100 invitations, 100,000 mutations and shorter windows. Where cargo-fuzz and a nightly
# compiler are installed, coverage-guided targets run as well (FUZZ_RUNS inputs each, a million unless it is set; --quick:
# none).

set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/check/figures.sh
figure() { PYTHONPATH=scripts/check python3 -c "import figures; figures.$1" ; }

# counted LOG PATTERN: the first number in the last line that matches; 0 where there is none.
counted() { grep -E "$2" "$1" | tail -n 1 | grep -oE '[0-9]+' | head -n 1 || echo 0; }

# tried LOG COMMAND...: runs it, and shows what went wrong.
tried() {
    local log=$1
    shift
    "$@" > "$log" 2>&1 || { grep -E 'panicked|error' -A 3 "$log" | head -n 20 >&2; return 1; }
}

if wanted 5 || wanted 6; then
    say "== building (minutes on a fresh machine: burn)"
    cargo build --release --workspace >&2
    cargo build --release -p net --example hostile >&2
    export PATH=$built:$PATH HOSTILE=$built/examples/hostile
fi

if wanted 5; then
    say "== figure 5: wrong identities"
    log=$work/identities.log
    tried "$log" cargo test --release -p net --test identities -- --nocapture || : > "$log"
    refused=$(grep -c '^refused: ' "$log" || true) believed=$(grep -c '^not believed: ' "$log" || true)
    figure "at_least('5 wrong participants, all refused before they are heard', $refused, 30)"
    figure "at_least('5 wrong coordinators, none believed', $believed, 10)"
    count=1000
    [ -z "$quick" ] || count=100
    say "== figure 5: $count invitations, each used twice at once"
    log=$work/invitations.log
    HEADWATER_INVITATIONS=$count tried "$log" cargo test --release --workspace --test federation -- --nocapture \
        of_two_uses_of_an_invitation_at_once || : > "$log"
    figure "at_least('5 invitations used twice at once, one success each', $(counted "$log" 'used twice at once, one'), $count)"
    say "== figure 5: a device is revoked"
    python3 scripts/check/hostile/peers.py "$work" revoke
fi

if wanted 6; then
    say "== figure 6: a crowd"
    python3 scripts/check/hostile/peers.py "$work" crowd ${quick:+--quick}
    say "== figure 6: one hostile participant"
    python3 scripts/check/hostile/peers.py "$work" one ${quick:+--quick}
    say "== figure 6: an honest peer that reads 256 MiB slowly"
    read=0
    ! HEADWATER_SLOW_MIB=256 tried "$work/slow.log" cargo test --release -p net --test quic slow_reader || read=256
    figure "exactly('6 slow reader: read to the end without being cut off', $read, 256, 'MiB')"
fi

if wanted 7; then
    mutations=1000000 files=10000000
    [ -z "$quick" ] || mutations=100000 files=100000
    for crate in wire net; do
        say "== figure 7: $mutations executions of each decoder in $crate"
        log=$work/decoders-$crate.log
        HEADWATER_MUTATIONS=$mutations tried "$log" cargo test --release -p $crate --test hostile -- --nocapture || : > "$log"
        grep -E ' executions: ' "$log" >&2 || true
        # On one core the first line begins with the test's name.
        decoders=$(grep -cE "(^| )$mutations executions: " "$log" || true)
        expected=11
        [ $crate = wire ] || expected=4
        figure "exactly('7 decoders in $crate: $mutations executions each, at most 2 x input + 64 KiB, 0 findings', $decoders, $expected)"
    done
    say "== figure 7: $files mutated GGUF files"
    log=$work/gguf.log
    HEADWATER_MUTATIONS=$files tried "$log" cargo test --release -p quant --test hostile -- --nocapture || : > "$log"
    figure "at_least('7 mutated GGUF files refused clearly or read whole', $(counted "$log" ' mutations:'), $files)"
fi

if wanted 7 && [ -z "$quick" ] && cargo +nightly fuzz --version > /dev/null 2>&1; then
    for target in quant/reader quant/imatrix wire/message wire/frame net/identity; do
        crate=${target%/*} name=${target#*/} runs=${FUZZ_RUNS:-1000000} finished=0
        say "== figure 7, coverage-guided: $target, $runs inputs"
        if [ "$crate" = quant ]; then
            # Seeds: sound files, which random bytes never reach.
            mkdir -p "shared/quant/fuzz/corpus/$name"
            HEADWATER_SEEDS=$PWD/shared/quant/fuzz/corpus/$name cargo test --release -p quant --test hostile > /dev/null
        fi
        if tried "$work/fuzz-$name.log" env -C "shared/$crate" cargo +nightly fuzz run "$name" -- -runs="$runs" -max_len=4096 \
            -malloc_limit_mb=64 -timeout=5; then
            finished=$runs
        fi
        tail -n 1 "$work/fuzz-$name.log" >&2
        figure "at_least('7 fuzzed inputs without a crash: $target', $finished, $runs)"
    done
fi
