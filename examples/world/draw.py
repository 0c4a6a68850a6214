"""Draw the pictures that the transformer is trained on, with their captions.

    python examples/world/draw.py

writes work/world/pictures: PNG files and metadata.jsonl. About a minute for 20,000.
"""

from parts import TRAINING_SEED, parse, parser, positive, run
from rich.console import Console

from ftk.demo.world import write_world


def main() -> None:
    """The command."""
    made = parser(__doc__)
    made.add_argument("--count", type=positive, default=20_000, help="pictures")
    options = parse(made)
    table = write_world(options.directory / "pictures", options.count, TRAINING_SEED)
    Console().print(f"{options.count:,} pictures and {table}")


if __name__ == "__main__":
    run(main)
