#!/usr/bin/env bash
# Hostile GGUF files: every truncation of a small model and ten million random mutations, each read whole under an
# allocator that counts. No panic, no hang, nothing that takes more than twice the file's size at once.
#
#   scripts/check/hostile.sh [--json] [--quick]
#
# --quick: a hundred thousand mutations. Where cargo-fuzz and a nightly compiler are installed, two coverage-guided targets
# run as well, the reader's and the importance matrix' (FUZZ_RUNS inputs each, ten million unless it is set; --quick: none).

set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/check/figures.sh
figure() { PYTHONPATH=scripts/check python3 -c "import figures; figures.$1" ; }

mutations=10000000
[ -z "$quick" ] || mutations=100000
say "== $mutations mutations"
survived=0
if HEADWATER_MUTATIONS=$mutations cargo test --release -p quant --test hostile -- --nocapture > "$work/hostile.log" 2>&1; then
    survived=$(grep -o '[0-9]* mutations:' "$work/hostile.log" | cut -d ' ' -f 1)
fi
grep -E 'mutations:|panicked' "$work/hostile.log" >&2 || true
figure "at_least('7 mutated files refused clearly or read whole', $survived, $mutations)"

if [ -z "$quick" ] && cargo +nightly fuzz --version > /dev/null 2>&1; then
    for target in reader imatrix; do
        runs=${FUZZ_RUNS:-10000000} done=0
        say "== fuzzing: $target, $runs inputs"
        # Seeds: sound files, which random bytes never reach.
        mkdir -p "shared/quant/fuzz/corpus/$target"
        HEADWATER_SEEDS=$PWD/shared/quant/fuzz/corpus/$target cargo test --release -p quant --test hostile > /dev/null
        if (cd shared/quant && cargo +nightly fuzz run "$target" -- -runs="$runs" -max_len=4096 -malloc_limit_mb=64 -timeout=5) \
            > "$work/fuzz-$target.log" 2>&1; then
            done=$runs
        fi
        tail -n 1 "$work/fuzz-$target.log" >&2
        figure "at_least('7 fuzzed inputs without a crash: $target', $done, $runs)"
    done
fi
