# What every check begins with: options, a working directory, and the table at the end. Sourced, from the repository's
# root.
#
# Whatever stops a check, the table shows the figures it reached; the exit code is 0 only if nothing failed and every
# figure is met.

json= quick= only= long= corpus=
while [ $# -gt 0 ]; do
    case $1 in
        --json) json=--json ;;
        --quick) quick=yes ;;
        --only) only=$2; shift ;;
        --quality | --strategies) long=${1#--} ;;
        --e2e) long=quality corpus=e2e ;;
        *) sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; [ "$1" = --help ] && exit 0 || exit 2 ;;
    esac
    shift
done

# Figure N is measured if no other was asked for.
wanted() { [ -z "$only" ] || [ "$only" = "$1" ]; }
say() { echo "$*" >&2; }
# What cargo built.
built=$(realpath --canonicalize-missing "${CARGO_TARGET_DIR:-target}")/release

work=$(mktemp -d)
export FIGURES=$work/figures.jsonl HEADWATER_CACHE=$work/cache PYTHONDONTWRITEBYTECODE=1
: > "$FIGURES"
finish() {
    local status=$?
    trap - EXIT
    kill $(jobs -p) 2> /dev/null || true
    python3 scripts/check/figures.py "$FIGURES" $json || status=1
    if [ $status = 0 ]; then rm -rf "$work"; else say "the working files stay in $work"; fi
    exit $status
}
trap finish EXIT
trap 'exit 130' INT TERM
