#!/usr/bin/env bash
# Checks the CPU kernels: the crate's tests, which take every path of the machine they run on, in four surroundings. No test
# may fail, and none may be missing.
#
#   scripts/check/kernels.sh [--json] [--quick] [--only FIGURE]
#
#   1  as released, on every path of this CPU; thousands of random shapes
#   2  the same under AddressSanitizer; in this and the next two, debug builds make unused memory not-a-number
#   3  on an emulated aarch64, for NEON and its bf16 products
#   4  under Miri, which knows plain Rust alone: the portable path, and the threads
#
# Some eight minutes on two cores, or three with --quick, which draws a tenth of the shapes and leaves Miri out. What cannot
# run on this machine says SKIPPED and why. Compilers, emulator and Miri are fetched where that is possible.

set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/check/figures.sh

host=$(rustc -vV | sed -n 's/^host: //p')
arm=aarch64-unknown-linux-gnu
# Tests of debug builds take minutes unoptimized.
export CARGO_PROFILE_DEV_OPT_LEVEL=2 CARGO_PROFILE_DEV_DEBUG=line-tables-only

# check NAME PATHS COMMAND...: the tests by some cargo, which should find so many paths or more.
check() {
    local name=$1 paths=$2 log=$work/${1%% *}.log status=0
    say "== $name"
    "${@:3}" -p kernels --lib --test kernels --test allocations --no-fail-fast -- --show-output "${filter[@]}" > "$log" 2>&1 || status=$?
    [ $status = 0 ] || tail -n 60 "$log" >&2
    python3 scripts/check/kernels.py "$name" "$log" "$status" "$paths"
}
filter=()
# shapes N: how many of each kind to draw.
shapes() { export HEADWATER_SHAPES=0..$([ "$quick" ] && echo $(($1 / 10)) || echo "$1"); }

if wanted 1; then
    shapes 3000
    check "1 released" 1 cargo test --release
fi

if wanted 2; then
    shapes 200
    # The stable compiler has the sanitizer; only its flag is called unstable.
    RUSTC_BOOTSTRAP=1 RUSTFLAGS=-Zsanitizer=address check "2 AddressSanitizer" 1 cargo test --target "$host"
fi

# Compiles and runs for aarch64, once what that takes is there.
emulator() {
    if ! command -v aarch64-linux-gnu-gcc qemu-aarch64; then
        apt-get install --yes gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user || return
    fi
    rustup target add $arm
}

if wanted 3; then
    if [ "$host" = $arm ]; then
        say "SKIPPED  3: this machine is an aarch64, which figure 1 has tested"
    elif ! emulator > "$work/emulator.log" 2>&1; then
        say "SKIPPED  3: no compiler or emulator for aarch64 ($(tail -n 1 "$work/emulator.log"))"
    else
        shapes 100
        export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
        export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64 -cpu max -L /usr/aarch64-linux-gnu"
        check "3 aarch64" 3 cargo test --target $arm
    fi
fi

if wanted 4; then
    if [ "$quick" ]; then
        say "SKIPPED  4: Miri takes minutes, and this is --quick"
    elif ! { cargo +nightly miri --version || rustup component add --toolchain nightly miri rust-src; } > /dev/null 2>&1; then
        say "SKIPPED  4: no nightly with Miri is installed"
    else
        # Few and small shapes of its own; logarithms that are the same each time. The tests of fixed sizes, and of whole
        # models, would take hours.
        unset HEADWATER_SHAPES
        filter=(--skip blocks:: --skip heads:: --skip inference::tests::)
        MIRIFLAGS=-Zmiri-deterministic-floats check "4 Miri" 1 cargo +nightly miri test
    fi
fi
