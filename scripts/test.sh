#!/usr/bin/env bash
# Every test: format, dependencies, lints, and the tests themselves, in the demo's build profile, so that burn is compiled once.
#
#   scripts/test.sh [--quick]     --quick: does not install cargo-deny where it is missing
#
# The first run takes up to 40 minutes on two cores, 17 of them for burn with both of its CPU backends; later ones take minutes.
# A failure does not keep the other checks from running. What cannot be checked on this machine is listed before the tests begin.

set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

case ${1-} in
    '') quick= ;;
    --quick) quick=yes ;;
    *) sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; [ "$1" = --help ] && exit 0 || exit 2 ;;
esac
target=$(realpath --canonicalize-missing "${CARGO_TARGET_DIR:-target}")
PATH=$PATH:$HOME/.cargo/bin:$target/tools/bin
# The second backend is switched on for the oracle tests, and for the lints, which otherwise would look at different dependencies.
build=(--release --workspace --locked --features ndarray)

failed=() skipped=()
check() {
    printf '\n== %s\n' "$*"
    "$@" || failed+=("$*")
}

check cargo fmt --all --check
for script in scripts/*.sh scripts/check/*.sh scripts/bench/*.sh .ci/run; do check bash -n "$script"; done

# Licences, sources and advisories.
if ! command -v cargo-deny > /dev/null && [ -z "$quick" ]; then
    printf '\n== installing cargo-deny into %s/tools (minutes, once)\n' "$target"
    cargo install cargo-deny --version 0.20.2 --locked --root "$target/tools"
fi
if command -v cargo-deny > /dev/null; then
    check cargo deny check bans licenses sources
    # The advisories are a Git repository on GitHub, which not every machine reaches.
    if timeout 120 cargo deny fetch db; then
        check cargo deny check advisories
    else
        skipped+=("advisories: their database cannot be fetched")
    fi
else
    skipped+=("licences, sources and advisories: cargo-deny is not installed${quick:+, and --quick does not install it}")
fi

# Lints need only the metadata of the dependencies: four CPU minutes, where compiling them takes thirty.
check cargo clippy "${build[@]}" --all-targets -- -D warnings

printf '\n'
for what in "${skipped[@]}"; do printf 'SKIPPED  %s\n' "$what"; done
[ ${#failed[@]} = 0 ] || printf 'FAILED   %s\n' "${failed[@]}"

compgen -G "$target/release/deps/libburn_ndarray-*.rlib" > /dev/null ||
    echo "burn with two backends takes about 17 minutes to compile on two cores. This happens once."
check cargo test "${build[@]}" --no-fail-fast

[ ${#failed[@]} = 0 ] && exit 0
printf '\n' >&2
printf 'FAILED   %s\n' "${failed[@]}" >&2
exit 1
