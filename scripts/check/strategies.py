"""Every strategy's mean held-out loss, relative to fedavg's: strategies.py LOSSES (laid out as for quality.py)"""

import sys

import figures
from quality import mean, table


def main(folder):
    losses = table(folder)
    fedavg = mean(losses.pop("fedavg"))
    for name, row in losses.items():
        figures.noted(f"4 strategies: {name} above fedavg", 100 * (mean(row) / fedavg - 1), "%")


if __name__ == "__main__":
    main(*sys.argv[1:])
