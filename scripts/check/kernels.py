"""What a run of the kernels' tests says: kernels.py NAME LOG STATUS PATHS

The log is cargo's, with the tests' output, which names the paths; a run that stops early has announced more tests than it
reports.
"""

import re
import sys

import figures


def main(name, log, status, paths_min):
    with open(log, encoding="utf-8", errors="replace") as file:
        text = file.read()
    announced = sum(int(tests) for tests in re.findall(r"^running (\d+) tests?$", text, re.MULTILINE))
    passed = len(re.findall(r"^test .* ok$", text, re.MULTILINE))
    paths = sorted(set(re.findall(r"^path (\w+)$", text, re.MULTILINE)))
    # A build that fails announces no test, and leak checks come after the last one.
    failed = announced - passed or int(status != "0")
    figures.exactly(f"{name}: tests that did not pass", failed, 0)
    figures.at_least(f"{name}: tests that passed", passed, 1)
    figures.at_least(f"{name}: paths", len(paths), int(paths_min), ", ".join(paths))


if __name__ == "__main__":
    main(*sys.argv[1:])
