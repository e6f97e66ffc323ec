"""Time and memory of adapted models, compared with the same models frozen.

    python benchmarks/run.py [--only stack-float32] [--large] [--rounds 9]

The floor of each case is the same network with all parameters frozen, forward and
backward to the inputs. No LoRA can be faster. Steps also update the adapters by Adam.
All programs of a case take turns, and each ratio is to the floor in the same round.
Peers run if they are installed: `pip install flax qwix quax peft`.

Writes `speed.json` and `speed.png`.
"""

import argparse
from pathlib import Path

from contests import every_case
from harness import compare, machine, print_rows, Row, save_chart, save_json


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", default=[""], help="parts of the names of groups of cases"
    )
    parser.add_argument("--rounds", type=int, default=9)
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--small", action="store_true", help="to see that it runs")
    sizes.add_argument(
        "--large", action="store_true", help="other cases, which keep a GPU busy"
    )
    parser.add_argument("--output", type=Path, default=Path("out"))
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("--rounds must be at least 2, for there to be quartiles")
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    rows: list[Row] = []
    size = "small" if args.small else "large" if args.large else "medium"
    for case, floor, programs in every_case(args.only, size):
        of_case = compare(case, floor, programs, args.rounds)
        print_rows(of_case)
        rows += of_case
    if not rows:
        parser.error(f"--only {' '.join(args.only)}: these are parts of no name")
    save_json(rows, args.output / "speed.json")
    save_chart(rows, args.output / "speed.png")
    print(f"\nWritten: {args.output / 'speed.json'}, {args.output / 'speed.png'}")


if __name__ == "__main__":
    main()
