"""Wildcards: what they stand for, against enumerators that were written from their rules alone."""

import itertools
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftk.configs.schema import CaptionsConfig, SourceConfig
from ftk.pipeline import captions, wildcards


def _variants(text: str, most: int = 1000) -> list[str]:
    return [variant for (variant,) in wildcards.variants([text], most)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a cat", ["a cat"]),
        ("a {red|blue} car", ["a red car", "a blue car"]),
        ("{a|b} {c|d}", ["a c", "a d", "b c", "b d"]),
        ("{a|b {c|d}|}", ["a", "b c", "b d", ""]),
        ("{{a|b}|c}", ["a", "b", "c"]),
        ("{a|b}{c|d|e}f", ["acf", "adf", "aef", "bcf", "bdf", "bef"]),
        ("one\ntwo {a|b}", ["one\ntwo a", "one\ntwo b"]),
        # Braces that are none of a wildcard.
        ("{x}", ["{x}"]),
        ("{}", ["{}"]),
        ("a | b", ["a | b"]),
        ("{x} {a|b}", ["{x} a", "{x} b"]),
        ("{x {a|b}}", ["{x a}", "{x b}"]),
        ("{{a|b}}", ["{a|b}"]),
        ("{{a|b}} {c|d}", ["{a|b} c", "{a|b} d"]),
        ("{{x}} {a|b}", ["{{x}} a", "{{x}} b"]),
        (r"\{a|b\}", [r"\{a|b\}"]),
        ("{a|b", ["{a|b"]),
        ("a|b}", ["a|b}"]),
        ("{a|{b|c}", ["{a|b", "{a|c"]),
        ('{"objects": ["a|b"], "style": {"a": "b|c"}}', ['{"objects": ["a|b"], "style": {"a": "b|c"}}']),
        # Forms of sd-dynamic-prompts that are not read.
        ("{2$$a|b|c}", ["{2$$a|b|c}"]),
        ("{1-2$$ and $$a|b}", ["{1-2$$ and $$a|b}"]),
        ("{0.5::a|b}", ["{0.5::a|b}"]),
        ("{a|3::b} {c|d}", ["{a|3::b} c", "{a|3::b} d"]),
        ("{16:9|4:3}", ["16:9", "4:3"]),
    ],
)
def test_a_group_is_one_of_its_options(text: str, expected: list[str]) -> None:
    assert _variants(text) == expected
    assert wildcards.count([text]) == len(expected)


TREES: Any = st.recursive(
    st.text(alphabet="ab ,", max_size=3),
    lambda inner: st.lists(inner, min_size=2, max_size=3) | st.tuples(inner, inner),
    max_leaves=6,
)


def _written(tree: Any) -> str:
    """Text, a list as a group of options, a tuple as its two parts with a word between."""
    if isinstance(tree, str):
        return tree
    parts = [_written(each) for each in tree]
    # A space behind the brace: doubled braces are literal ones.
    return "{ " + "|".join(parts) + "}" if isinstance(tree, list) else "x".join(parts)


def _meant(tree: Any) -> list[str]:
    if isinstance(tree, str):
        return [tree]
    if isinstance(tree, tuple):
        return [f"{first}x{second}" for first, second in itertools.product(*map(_meant, tree))]
    first, *others = map(_meant, tree)
    return [f" {text}" for text in first] + [text for option in others for text in option]


@given(TREES)
def test_nested_groups_give_every_combination_once(tree: Any) -> None:
    text, meant = _written(tree), _meant(tree)
    assert _variants(text, 10_000) == meant
    some = _variants(text, 3)
    assert len(some) == min(3, len(meant))
    assert all(text in meant for text in some)


PLAIN = st.lists(st.sampled_from(["a ", "{b|c}", "{d|e|f}", ", ", "{{g|h}}", "i"]), max_size=4).map("".join)


@given(PLAIN)
def test_groups_that_are_not_nested_are_those_of_sd_scripts(text: str) -> None:
    # What sd-scripts' process_caption can draw: doubled braces stand for braces, `{([^}]+)}` for one of its options.
    hidden = text.replace("{{", "\0").replace("}}", "\1")
    groups = re.split(r"\{([^}]+)\}", hidden)
    choices = [[part] if position % 2 == 0 else part.split("|") for position, part in enumerate(groups)]
    drawn = ["".join(parts).replace("\0", "{").replace("\1", "}") for parts in itertools.product(*choices)]
    assert _variants(text) == drawn


@given(st.text(alphabet="{|}\\ab$:1 ", max_size=40))
def test_any_text_has_at_least_one_variant_and_never_more_than_asked_for(text: str) -> None:
    found = _variants(text, 5)
    assert 1 <= len(found) <= 5
    assert len(found) == min(5, wildcards.count([text]))
    assert _variants(text, 0) == [text]
    assert found == _variants(text, 5)


def test_of_very_many_variants_some_are_taken_from_everywhere() -> None:
    text = "".join(f"{{a{group}|b{group}}}" for group in range(400))
    assert wildcards.count([text]) == 2**400
    found = _variants(text, 32)
    assert len(set(found)) == 32
    for group in (0, 199, 399):
        assert 4 < sum(f"a{group}" in re.findall(r"[ab]\d+", variant) for variant in found) < 28


def test_deep_nesting_and_long_captions_are_read_in_time() -> None:
    assert _variants("{a|" * 30_000)
    assert _variants("{" * 30_000 + "a|b" + "}" * 30_000, 8)
    nested = "{a|" * 32 + "b" + "}" * 32
    assert len(_variants(nested)) == 33


def _finish(*texts: str, key: str = "key", **settings: Any) -> list[str]:
    names = CaptionsConfig.model_fields.keys()
    config = CaptionsConfig(**{name: value for name, value in settings.items() if name in names})
    source = SourceConfig(path="p", **{name: value for name, value in settings.items() if name not in names})
    return captions.finish(texts, source, config, key)


def test_wildcards_become_captions_of_the_sample() -> None:
    assert _finish("a {red|blue} car") == ["a red car", "a blue car"]
    assert _finish("a {red|blue} car", key="other") == ["a red car", "a blue car"]
    assert _finish("a {red|blue} car", wildcards=0) == ["a {red|blue} car"]
    assert _finish("a car", prefix="{photo|sketch} of", suffix="{today|}") == [
        "photo of a car today", "photo of a car", "sketch of a car today", "sketch of a car",
    ]  # fmt: skip
    assert _finish("{a|[trigger]} dog", trigger="sks") == ["sks, a dog", "sks dog"]
    assert _finish("{|a cat}", "{|}") == ["a cat"]
    assert _finish("{|}") == ["{|}"]
    assert _finish("{|a cat}", trigger="sks") == ["sks", "sks, a cat"]
    assert _finish("{a|a}") == ["a"]


def test_a_caption_has_no_more_variants_than_the_bound() -> None:
    many = "{a|b|c|d} {e|f|g|h} {i|j|k|l}"
    assert len(_finish(many)) == 32
    assert len(set(_finish(many))) == 32
    assert len(_finish(many, wildcards=64)) == 64
    source = SourceConfig(path="p")
    assert captions.num_cut((many, "{a|b}"), source, CaptionsConfig()) == 1
    assert captions.num_cut((many,), source, CaptionsConfig(wildcards=64)) == 0
    assert captions.num_cut((many,), source, CaptionsConfig(wildcards=0)) == 0


def test_each_variant_is_shuffled() -> None:
    found = _finish("{cat|dog}, a, b, c", tag_shuffles=2)
    assert len(found) == 6
    assert [text.partition(",")[0] for text in found] == ["cat"] * 3 + ["dog"] * 3


def test_the_default_bound_leaves_recipes_as_they_were() -> None:
    assert "wildcards" not in CaptionsConfig().model_dump()
    assert CaptionsConfig(wildcards=8).model_dump()["wildcards"] == 8
