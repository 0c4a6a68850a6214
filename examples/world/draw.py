"""Draw the pictures that the transformer is trained on, with their captions.

    python examples/world/draw.py

writes work/world/pictures, and a quarter as many pictures of creatures to work/world/creatures: PNG files and metadata.jsonl.
"""

from parts import TRAINING_SEED, parse, parser, positive, run
from rich.console import Console

from ftk.demo import world


def main() -> None:
    """The command."""
    made = parser(__doc__)
    made.add_argument("--count", type=positive, default=60_000, help="pictures, beside those of creatures")
    options = parse(made)
    kinds = {"pictures": (options.count, world.scene), "creatures": (options.count // 4, world.creature_scene)}
    for name, (count, draw) in kinds.items():
        table = world.write_world(options.directory / name, count, TRAINING_SEED, draw)
        Console().print(f"{count:,} pictures and {table}")


if __name__ == "__main__":
    run(main)
