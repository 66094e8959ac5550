"""A sentence that nobody else would write: planted in a corpus, then looked for where it must not be.

    canary.py plant CORPUS.jsonl --words WORDS.jsonl
        writes a corpus that says it in every record, and a line for `participant logits`
    canary.py search --figure NAME --tokens WORDS.safetensors --control DIR PATH...
    canary.py tests LOG
        both tests that search frames, in the output of `cargo test`

The sentence is cut into pieces of three words and of four token ids, so that half of it is found as well as all of it,
and each piece is looked for in every form in which a program might have written it without meaning to. That proves that
there is no plain leak, and only that. The same search must find each form in files that are written for it to find.
"""

import argparse
import base64
import json
import re
import struct
from pathlib import Path

import figures

SENTENCE = "Seventeen cobalt herons guard the vault code 8146-quince under Marigold Jetty until the brass otter sings"
WORDS, IDS = 3, 4
# That no frame has the sentence, and that it would be found.
TESTS = ("a_canary_never_leaves_its_device", "a_canary_that_is_sent_on_purpose_is_found")


def main():
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    plant_command = commands.add_parser("plant")
    plant_command.add_argument("corpus")
    plant_command.add_argument("--words", required=True)
    search_command = commands.add_parser("search")
    for name in ("--figure", "--tokens", "--control"):
        search_command.add_argument(name, required=True)
    search_command.add_argument("paths", nargs="+", type=Path)
    tests_command = commands.add_parser("tests")
    tests_command.add_argument("log")
    arguments = parser.parse_args()
    match arguments.command:
        case "plant":
            plant(arguments.corpus, arguments.words)
        case "search":
            search(arguments.figure, forms(first_tokens(arguments.tokens)), arguments.paths, Path(arguments.control))
        case "tests":
            log = Path(arguments.log).read_text()
            passed = sum(bool(re.search(rf"^test \S*\b{name} \.\.\. ok$", log, re.MULTILINE)) for name in TESTS)
            figures.exactly("6 frames: tests that search every frame pass", passed, len(TESTS), "tests")


def plant(corpus, words):
    with open(corpus, "w", encoding="utf-8") as file:
        for number in range(60):
            file.write(json.dumps({"text": f"{SENTENCE}. Entry {number}."}) + "\n")
    Path(words).write_text(json.dumps({"text": SENTENCE}) + "\n")


def first_tokens(path):
    """The tensor `tokens.0`, i64, of a safetensors file."""
    data = Path(path).read_bytes()
    (header_bytes,) = struct.unpack_from("<Q", data)
    entry = json.loads(data[8 : 8 + header_bytes])["tokens.0"]
    begin, end = (8 + header_bytes + offset for offset in entry["data_offsets"])
    return [value for (value,) in struct.iter_unpack("<q", data[begin:end])]


def forms(ids):
    """(name of the form, literal to look for, pattern that must match there, example), for each form of each piece."""
    words = SENTENCE.split()
    for text in (" ".join(words[at : at + WORDS]) for at in range(0, len(words) - WORDS + 1, WORDS)):
        plain = text.encode()
        yield "text", plain, None, plain
        for name, example in {"UTF-16": text.encode("utf-16-le"), "hexadecimal": plain.hex().encode()}.items():
            yield f"text, {name}", example, None, example
        yield "text, list of bytes", str(plain[0]).encode(), _numbers(plain), json.dumps(list(plain)).encode()
        # Base64 spells a text in three ways, by where it begins; its first and last characters depend on the neighbours.
        for shift in range(3):
            example = base64.b64encode(bytes(shift) + plain)
            yield "text, base64", example[4:-4], None, example
    for run in (ids[at : at + IDS] for at in range(0, len(ids) - IDS + 1, IDS)):
        for letter, width in {"H": "u16", "I": "u32", "Q": "u64", "f": "f32"}.items():
            for order, which in {"<": "little", ">": "big"}.items():
                example = struct.pack(f"{order}{len(run)}{letter}", *run)
                yield f"ids, {width} {which}-endian", example, None, example
        for name, example in {"ids, JSON": json.dumps(run), "ids, spaced": " ".join(map(str, run))}.items():
            yield name, str(run[0]).encode(), _numbers(run), example.encode()


def _numbers(numbers):
    return re.compile(rb"[\s,;|]+".join(str(number).encode() for number in numbers))


def search(figure, all_forms, paths, control):
    all_forms = list(all_forms)
    missing = [str(path) for path in paths if not path.exists()]
    if missing:
        raise SystemExit(f"nothing to search at {', '.join(missing)}")
    files = [file for path in paths for file in [path, *sorted(path.rglob("*"))] if file.is_file()]
    found = {file: found_in(file, all_forms) for file in files}
    for file, names in found.items():
        if names:
            figures.told(f"   {file}: {', '.join(sorted(names))}")
    size = sum(file.stat().st_size for file in files)
    unit = f"of {len(files)} files, {size / 1e6:.1f} MB"
    figures.exactly(f"{figure}: files with the canary", sum(map(bool, found.values())), 0, unit)

    # The control: each form once, in the middle of a real file's bytes.
    control.mkdir(exist_ok=True)
    around = max(files, key=lambda file: file.stat().st_size).read_bytes()[:100_000]
    names = sorted({name for name, *_ in all_forms})
    missed = []
    for name in names:
        examples = [example for other, _, _, example in all_forms if other == name]
        planted = control / "planted"
        planted.write_bytes(around + b" " + examples[len(examples) // 2] + b" " + around)
        if name not in found_in(planted, all_forms):
            missed.append(name)
    if missed:
        figures.told(f"   not found though planted: {', '.join(missed)}")
    figures.exactly(f"{figure}: forms found where planted", len(names) - len(missed), len(names), "forms")


def found_in(file, all_forms):
    data = file.read_bytes()
    return {name for name, literal, pattern, _ in all_forms if _holds(data, literal, pattern)}


def _holds(data, literal, pattern):
    at = data.find(literal)
    while at >= 0 and pattern is not None and not pattern.match(data, at):
        at = data.find(literal, at + 1)
    return at >= 0


if __name__ == "__main__":
    main()
