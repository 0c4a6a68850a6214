"""Make the small text encoder and its tokenizer: Qwen2.5-VL's layout, 96 wide, two layers.

    python examples/world/make_text_encoder.py

writes work/world/tokenizer and work/world/text_encoder. The tokenizer is Qwen's, retrained on the world's captions and the
pipeline's prompt template: a token for each of their words, and single bytes for any other. The encoder learns for a minute or
two to predict the next token of a caption, and from the last one what the whole caption tells (`--objective`; `none` leaves it
random). A linear probe then shows what its features keep apart; no probe looks at a caption that was trained on.

Shape legend: B batch, L tokens, D width.
"""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from parts import TEXT_CONFIG, TEXT_WIDTH, TRAINING_SEED, fit, parse, parser, positive, run
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from ftk import storage
from ftk.demo import world
from ftk.demo.scenes import (
    COLOURS,
    CREATURE,
    PLACES,
    RADII,
    RELATIONS,
    SHAPES,
    TEXTURES,
    Scene,
    creature_name,
    generator,
    relation,
)
from ftk.models.qwen_image import FAMILY, PREFIX_TOKENS, TEMPLATE

NUM_TOKENIZER_CAPTIONS = 4000
VOCABULARY = 1024
"""More than there is to merge: each word of captions and template becomes one token."""
BATCH_SIZE = 64
NUM_MADE_UP = 8
"""Captions of a batch about something that has no known name."""
LEARNING_RATE = 2e-3
OBJECTIVES = ("none", "words", "attributes", "both")
NUM_PROBED = 2400
NUM_PROBE_TRAINING = 1800
RIDGE = 1e-2

_ATTRIBUTES: dict[str, Sequence[str]] = {"shape": SHAPES, "colour": list(COLOURS), "size": list(RADII), "place": list(PLACES)}
CLASSES: dict[str, Sequence[str]] = {
    "ground.colour": list(COLOURS),
    "ground.texture": TEXTURES,
    "relation": list(RELATIONS),
    **{f"things.{number}.{name}": values for number in range(2) for name, values in _ATTRIBUTES.items()},
}
"""What a caption can tell, and how many ways there are; one more class stands for what it does not tell."""


def make_tokenizer() -> Any:
    """Qwen's, with a vocabulary of the world's words and of all bytes."""
    with tempfile.TemporaryDirectory() as folder:
        FAMILY.tiny(Path(folder))
        base = Qwen2Tokenizer.from_pretrained(Path(folder) / "tokenizer")
    return base.train_new_from_iterator(_texts(), vocab_size=VOCABULARY, show_progress=False)


def _texts() -> Iterator[str]:
    yield TEMPLATE.replace("<|im_start|>", "").replace("<|im_end|>", "")
    for index in range(NUM_TOKENIZER_CAPTIONS):
        yield world.scene(TRAINING_SEED, index).caption


def make_encoder(vocabulary: int) -> Any:
    """The language model of random weights, with the vision tower that its class has."""
    torch.manual_seed(TRAINING_SEED)
    settings = {**TEXT_CONFIG, "text_config": {**TEXT_CONFIG["text_config"], "vocab_size": vocabulary}}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**settings))


def value_of(scene: Scene, name: str) -> str:
    """What a scene's caption tells of an attribute; empty where it tells nothing, or something that is not of the world."""
    if name not in scene.told:
        return ""
    if name == "relation":
        first, second = scene.things
        return relation((first.x, first.y), (second.x, second.y))
    owner, _, attribute = name.rpartition(".")
    if owner == "ground":
        return scene.ground if attribute == "colour" else scene.texture
    found: str = getattr(scene.things[int(owner.rpartition(".")[2])], attribute)
    return "" if attribute == "shape" and found not in SHAPES else found


def targets(scenes: Sequence[Scene]) -> torch.Tensor:
    """[B, number of attributes]: the class of each; the last class is that nothing is told."""
    rows = [[[*values, ""].index(value_of(scene, name)) for name, values in CLASSES.items()] for scene in scenes]
    return torch.tensor(rows)


def batch(step: int) -> tuple[list[str], list[Scene]]:
    """Captions and what they are about; some name things that nobody has heard of."""
    known = [world.scene(TRAINING_SEED, step * BATCH_SIZE + number) for number in range(BATCH_SIZE - NUM_MADE_UP)]
    unknown = [world.concept_scene(TRAINING_SEED, step * BATCH_SIZE + number) for number in range(NUM_MADE_UP)]
    rng = generator("words", TRAINING_SEED, step)
    captions = [scene.caption for scene in known]
    captions += [scene.caption.replace(CREATURE, creature_name(rng)) for scene in unknown]
    return captions, [*known, *unknown]


def token_ids(tokenizer: Any, captions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, L] ids in the template, padded on the right, where a causal model does not look, and [B] lengths."""
    rows = [torch.tensor(row) for row in tokenizer([TEMPLATE.format(caption) for caption in captions])["input_ids"]]
    return pad_sequence(rows, batch_first=True, padding_value=-100), torch.tensor([len(row) for row in rows])


def hidden(encoder: Any, ids_BL: torch.Tensor) -> torch.Tensor:
    """[B, L, D]: what the pipeline hands to the transformer, the prefix included."""
    states: torch.Tensor = encoder.model.language_model(input_ids=ids_BL.clamp(min=0), use_cache=False).last_hidden_state
    return states


def loss_of(encoder: Any, head: torch.nn.Linear, tokenizer: Any, objective: str, step: int) -> torch.Tensor:
    """Mean cross-entropy of the next tokens of captions, of what they tell, or the sum of both."""
    captions, scenes = batch(step)
    ids_BL, lengths_B = token_ids(tokenizer, captions)
    states_BLD = hidden(encoder, ids_BL)
    loss = torch.zeros(())
    if objective != "attributes":
        logits = encoder.lm_head(states_BLD[:, PREFIX_TOKENS - 1 : -1])
        loss = loss + F.cross_entropy(logits.flatten(0, 1), ids_BL[:, PREFIX_TOKENS:].flatten(), ignore_index=-100)
    if objective != "words":
        scores = head(states_BLD[torch.arange(len(captions)), lengths_B - 1]).split(
            [len(one) + 1 for one in CLASSES.values()], 1
        )
        wanted = targets(scenes).unbind(1)
        loss = loss + sum(F.cross_entropy(*pair) for pair in zip(scores, wanted, strict=True)) / len(CLASSES)
    return loss


def train(encoder: Any, tokenizer: Any, objective: str, steps: int, checkpoint: Path) -> None:
    """By next tokens, by attributes, or by both; the head that reads attributes is thrown away."""
    head = torch.nn.Linear(TEXT_WIDTH, sum(len(one) + 1 for one in CLASSES.values()))
    parameters = {
        **{f"encoder.{name}": one for name, one in encoder.model.language_model.named_parameters()},
        **(dict(head.named_parameters()) if objective != "words" else {}),
    }
    fit(
        parameters,
        lambda step: loss_of(encoder, head, tokenizer, objective, step),
        steps=steps,
        learning_rate=LEARNING_RATE,
        checkpoint=checkpoint,
    )


def features(encoder: Any, tokenizer: Any, scenes: Sequence[Scene]) -> dict[str, torch.Tensor]:
    """[B, D] each: the mean of a caption's tokens, and the last one."""
    found: dict[str, list[torch.Tensor]] = {"mean": [], "last": []}
    with torch.inference_mode():
        for start in range(0, len(scenes), BATCH_SIZE):
            part = scenes[start : start + BATCH_SIZE]
            ids_BL, lengths_B = token_ids(tokenizer, [scene.caption for scene in part])
            for states_LD, length in zip(hidden(encoder, ids_BL), lengths_B.tolist(), strict=True):
                found["mean"].append(states_LD[PREFIX_TOKENS:length].mean(dim=0))
                found["last"].append(states_LD[length - 1])
    return {name: torch.stack(rows).clone() for name, rows in found.items()}


def probe(encoder: Any, tokenizer: Any) -> dict[str, dict[str, float]]:
    """By feature and attribute, the share of held-out captions that tell it of which a ridge regression reads it right."""
    scenes = [world.scene(world.HELD_OUT_SEED, index) for index in range(NUM_PROBED)]
    wanted = targets(scenes)
    found: dict[str, dict[str, float]] = {}
    for feature, values_BD in features(encoder, tokenizer, scenes).items():
        scaled = (values_BD - values_BD.mean(dim=0)) / (values_BD.std(dim=0) + 1e-6)
        scaled = torch.cat([scaled, torch.ones(len(scaled), 1)], dim=1)
        found[feature] = {}
        for position, (name, classes) in enumerate(CLASSES.items()):
            told = (wanted[:, position] < len(classes)).nonzero()[:, 0]
            learned = told[told < NUM_PROBE_TRAINING]
            held_out = told[told >= NUM_PROBE_TRAINING]
            given = scaled[learned]
            gram = given.T @ given + RIDGE * len(given) * torch.eye(given.shape[1])
            weights = torch.linalg.solve(gram, given.T @ F.one_hot(wanted[learned, position], len(classes)).float())
            right = (scaled[held_out] @ weights).argmax(dim=1) == wanted[held_out, position]
            found[feature][name] = float(right.float().mean())
    return found


def show(probes: dict[str, dict[str, dict[str, float]]]) -> None:
    """A row for each attribute, a column for each encoder and feature."""
    table = Table(title="read right by a linear probe, of held-out captions", title_justify="left")
    table.add_column("attribute")
    columns = [(stage, feature) for stage, found in probes.items() for feature in found]
    for stage, feature in columns:
        table.add_column(f"{stage}, {feature}", justify="right")
    for name in CLASSES:
        table.add_row(name, *(f"{probes[stage][feature][name]:.0%}" for stage, feature in columns))
    Console().print(table)


def main() -> None:
    """The command."""
    made = parser(__doc__)
    made.add_argument("--objective", choices=OBJECTIVES, default="both")
    made.add_argument("--steps", type=positive, default=1500)
    options = parse(made)
    tokenizer = make_tokenizer()
    encoder = make_encoder(len(tokenizer))
    probes = {"random": probe(encoder, tokenizer)}
    if options.objective != "none":
        checkpoint = options.directory / f"text-{options.objective}.checkpoint.safetensors"
        train(encoder, tokenizer, options.objective, options.steps, checkpoint)
        probes[options.objective] = probe(encoder, tokenizer)
    for name, part in (("tokenizer", tokenizer), ("text_encoder", encoder)):
        with storage.committing_directory(options.directory / name) as temporary:
            part.save_pretrained(temporary)
    show(probes)


if __name__ == "__main__":
    run(main)
