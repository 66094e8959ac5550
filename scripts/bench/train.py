"""train.sh's measurements: every contender in a process of its own, in turn, several rounds of them all.

    train.py --participant PROGRAM --python PYTHON --model PATH --torch-model DIR --mkl LIBRARY
        [--quick] [--only SHAPE] [--json]

Prints the machine, a table (to the error stream with --json, where only figures belong on the output), and records
figures as scripts/check/figures.py does. A sample is the median step of one process; a number in the table is the median
of its samples. A contender that fails is left out, and the figures that need it are not met.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

import figures

# What a token costs: see `flops_per_step`.
BLOCKS, HIDDEN, FFN, KEYS, VOCABULARY, RANK = 30, 576, 1536, 192, 49152, 8
LINEARS = {  # inputs, outputs
    "q_proj": (HIDDEN, HIDDEN),
    "k_proj": (HIDDEN, KEYS),
    "v_proj": (HIDDEN, KEYS),
    "o_proj": (HIDDEN, HIDDEN),
    "gate_proj": (HIDDEN, FFN),
    "up_proj": (HIDDEN, FFN),
    "down_proj": (FFN, HIDDEN),
}
# Threads, batch, LoRA targets, timed steps.
QUICK = [(2, "4x128", "q_proj,v_proj", 3)]
FULL = [
    (threads, batch, lora, steps)
    for threads in (2, 1)
    for batch, steps in (("4x128", 3), ("8x256", 1))
    for lora in ("q_proj,v_proj", "all")
]


def main():
    parser = argparse.ArgumentParser()
    for name in ("--participant", "--python", "--model", "--torch-model", "--mkl"):
        parser.add_argument(name, required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", help="threads:batch:targets, such as 1:8x256:all")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    machine = Machine()
    out = sys.stderr if arguments.json else sys.stdout
    print(f"{machine.name}, {os.cpu_count()} cores\n{' '.join(machine.sets)}", file=out)
    print(f"goals of CPUs {'with' if machine.bf16 else 'without'} BF16; load {os.getloadavg()[0]:.1f}", file=out, flush=True)

    everyone = contenders(arguments, machine)
    shapes, rounds = (QUICK, 3) if arguments.quick else (FULL, 5)
    if arguments.only:
        shapes = [shape for shape in FULL if ":".join(map(str, shape[:3])) == arguments.only]
        if not shapes:
            parser.error(f"--only {arguments.only}: there are " + ", ".join(":".join(map(str, s[:3])) for s in FULL))
    results = {}
    for shape in shapes:
        threads, batch, lora, _ = shape
        samples = {name: [] for name in everyone}
        for turn in range(rounds):
            figures.told(f"   {threads} threads, {batch}, {lora}: round {turn + 1} of {rounds}")
            for name, contender in everyone.items():
                if samples[name] is not None:
                    sample = contender.measure(*shape)
                    samples[name] = samples[name] + [sample] if sample else None
        results[shape] = {name: summary(list_, batch, lora) for name, list_ in samples.items() if list_}
        print(f"\n{threads} threads, batch {batch}, LoRA rank {RANK} on {lora}; medians of {rounds}", file=out)
        print_table(results[shape], out)
    record(results, machine, arguments.quick)


class Machine:
    """The CPU, its vector instructions, and which class of goals it belongs to."""

    def __init__(self):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        flags = set(fields.get("flags", fields.get("Features", "")).split())
        told = ("avx2", "fma", "avx512", "avx_vnni", "amx", "neon", "asimd", "bf16", "i8mm", "sve")
        self.name = fields.get("model name", platform.machine())
        self.sets = sorted(flag for flag in flags if flag.startswith(told))
        self.bf16 = bool(flags & {"avx512_bf16", "bf16"})
        self.x86 = platform.machine() == "x86_64"
        # MKL keeps its best code for a CPU that calls itself Intel's.
        self.slighted = self.x86 and fields.get("vendor_id") != "GenuineIntel"


class Contender:
    def __init__(self, command, environment):
        self.command, self.environment = command, environment

    def measure(self, threads, batch, lora, steps):
        options = ["--batch", batch, "--lora", lora, "--threads", str(threads), "--steps", str(steps)]
        environment = {key: value for key, value in os.environ.items() if not key.startswith("OPENBLAS_")}
        environment |= {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"} | self.environment
        process = subprocess.run(self.command + options, env=environment, capture_output=True, text=True)
        if process.returncode == 0:
            return json.loads(process.stdout.splitlines()[-1])
        figures.told(f"   {' '.join(self.command + options)} failed:\n{process.stderr[-2000:]}")
        return None


def contenders(arguments, machine):
    """By name, in the order of a round."""

    def pytorch(type_, environment={}):
        script = str(Path(__file__).with_name("torch_train.py"))
        return Contender([arguments.python, script, "--model", arguments.torch_model, "--type", type_], environment)

    def ours(backend, weights, environment={}, options=()):
        command = [arguments.participant, "bench", "train", "--json", "--model", arguments.model]
        return Contender(command + ["--backend", backend, "--weights", weights, *options], environment)

    forced = {"LD_PRELOAD": arguments.mkl} if machine.slighted else {}
    # Forced, MKL also takes its own AVX2 code instead of the one it keeps for others: the faster of the two.
    avx2 = forced | {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
    everyone = {"PyTorch f32": pytorch("f32"), "native f32": ours("native", "f32")}
    if not arguments.quick:
        everyone["native f32, recompute"] = ours("native", "f32", options=["--recompute"])
    if forced:
        everyone["PyTorch f32, MKL forced"] = pytorch("f32", forced)
    everyone["native bf16"] = ours("native", "bf16")
    if machine.bf16:
        everyone["PyTorch bf16"] = pytorch("bf16")
    if not machine.bf16:
        everyone["native int8"] = ours("native", "int8")
    if machine.x86:
        everyone["PyTorch f32, AVX2"] = pytorch("f32", avx2)
        everyone["native f32, AVX2"] = ours("native", "f32", {"HEADWATER_KERNELS": "avx2"})
    if not machine.bf16:
        everyone["flex"] = ours("flex", "f32")
    return everyone


def summary(samples, batch, lora):
    def median(key):
        values = [sample[key] for sample in samples if key in sample]
        return statistics.median(values) if values else None

    ms = median("median_ms")
    return {
        "ms": ms,
        "tokens_per_s": median("tokens_per_s"),
        "gflops": flops_per_step(batch, lora) / ms / 1e6,
        "rss_mb": median("peak_rss_bytes") / 1e6,
        "peak_share": median("peak_share"),
        "isa": samples[0]["isa"],
    }


def flops_per_step(batch, lora):
    """The arithmetic that a step needs at least: a frozen weight is multiplied once forward and once backward, an adapter
    once forward and twice backward; causal attention is two products forward and four backward, of half a square."""
    sequences, tokens = map(int, batch.split("x"))
    frozen = BLOCKS * sum(inputs * outputs for inputs, outputs in LINEARS.values()) + VOCABULARY * HIDDEN
    targets = LINEARS if lora == "all" else lora.split(",")
    adapters = BLOCKS * RANK * sum(sum(LINEARS[target]) for target in targets)
    attention = BLOCKS * 6 * tokens * HIDDEN
    return sequences * tokens * (4 * frozen + 6 * adapters + attention)


def print_table(results, out):
    baseline = results.get("PyTorch f32", {}).get("ms")
    print(f"{'':24} {'ms':>8} {'tokens/s':>9} {'GFLOP/s':>8} {'peak':>5} {'RSS MB':>7} {'speed':>6}  instructions", file=out)
    for name, row in results.items():
        peak = f"{row['peak_share']:.0%}" if row["peak_share"] else ""
        speed = f"{baseline / row['ms']:.2f}x" if baseline else ""
        print(
            f"{name:24} {row['ms']:8.0f} {row['tokens_per_s']:9.0f} {row['gflops']:8.0f} {peak:>5} {row['rss_mb']:7.0f}"
            f" {speed:>6}  {row['isa']}",
            file=out,
            flush=True,
        )


def record(results, machine, quick):
    """The figures: of every shape, or every shape with as many threads, the worst."""

    def value(shape, names, key, best):
        found = [results[shape][name][key] for name in names if name in results[shape]]
        return best(found) if found and None not in found else float("nan")

    def faster(figure, goal, ours, theirs):
        for threads in sorted({shape[0] for shape in results}, reverse=True):
            shapes = [shape for shape in results if shape[0] == threads]
            ratios = [value(shape, theirs, "ms", min) / value(shape, ours, "ms", min) for shape in shapes]
            figures.at_least(f"1 {figure}, {threads} threads", worst(min, ratios), goal, "x speed")

    forced = ["PyTorch f32, MKL forced"] if machine.slighted else ["PyTorch f32"]
    if machine.bf16:
        faster("native bf16 / PyTorch bf16", 1.7, ["native bf16"], ["PyTorch bf16"])
        faster("native bf16 / PyTorch f32 as installed", 3.5, ["native bf16"], ["PyTorch f32"])
        faster("native f32 / PyTorch f32 as installed", 1.6, ["native f32"], ["PyTorch f32"])
        faster("native f32 / PyTorch f32 on MKL's fast path", 1.0, ["native f32"], forced)
    else:
        native = ["native f32", "native bf16", "native int8"]
        faster("best native / best PyTorch f32", 1.1, native, ["PyTorch f32"] + forced)
        faster("best native / flex", 3.5, native, ["flex"])
    if machine.x86:
        faster("native f32 / PyTorch f32, both on AVX2", 0.9, ["native f32, AVX2"], ["PyTorch f32, AVX2"])
    pairs = [("native f32", "PyTorch f32", 0.85)]
    if machine.bf16:
        pairs.append(("native bf16", "PyTorch bf16", 0.65))
    for ours, _, goal in pairs:
        shares = [value(shape, [ours], "peak_share", min) for shape in results]
        figures.at_least(f"2 {ours}, of this machine's peak", worst(min, shares), goal, "share")
    pairs = [(ours, theirs) for ours, theirs, _ in pairs]
    if not quick:
        pairs.append(("native f32, recompute", "PyTorch f32"))
    for ours, theirs in pairs:
        shares = [value(shape, [ours], "rss_mb", min) / value(shape, [theirs], "rss_mb", min) for shape in results]
        figures.at_most(f"3 {ours} / {theirs}, peak memory", worst(max, shares), 0.25, "share")


def worst(extreme, values):
    return float("nan") if any(value != value for value in values) else extreme(values)


if __name__ == "__main__":
    main()
