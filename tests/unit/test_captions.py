"""Captions: what is no clean text is a problem with a reason, never a sample."""

from pathlib import Path

import pytest

from ftk.contracts import RejectReason
from ftk.pipeline import captions


def _read(tmp_path: Path, data: bytes) -> str | captions.Problem:
    (tmp_path / "a.txt").write_bytes(data)
    return captions.read(tmp_path / "a.txt", fallback="the fallback")


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"a cat", "a cat"),
        (b"  a cat \r\n", "a cat"),
        ("größe 猫 🐈".encode(), "größe 猫 🐈"),
        ("a cat".encode("utf-8-sig"), "a cat"),
        (b"first\nsecond", "first\nsecond"),
    ],
)
def test_text_is_read_without_mark_and_margins(tmp_path: Path, data: bytes, text: str) -> None:
    assert _read(tmp_path, data) == text


@pytest.mark.parametrize(
    ("data", "reason", "detail"),
    [
        (b"", RejectReason.CAPTION_EMPTY, "is empty"),
        (b" \n\t", RejectReason.CAPTION_EMPTY, "is empty"),
        (b"\xef\xbb\xbf", RejectReason.CAPTION_EMPTY, "is empty"),
        ("größe".encode("latin-1"), RejectReason.CAPTION_NOT_TEXT, "not UTF-8 at byte 2"),
        ("a cat".encode("utf-16"), RejectReason.CAPTION_NOT_TEXT, "not UTF-8"),
        ("a cat".encode("utf-16-le"), RejectReason.CAPTION_NOT_TEXT, "NUL"),
        (b"a\0cat", RejectReason.CAPTION_NOT_TEXT, "NUL"),
        (b"x" * (captions.MAX_CAPTION_BYTES + 1), RejectReason.CAPTION_NOT_TEXT, "longer than 64 KiB"),
    ],
    ids=["empty", "blank", "only-mark", "latin-1", "utf-16", "utf-16-le", "nul", "long"],
)
def test_a_broken_caption_is_a_problem_even_with_a_fallback(
    tmp_path: Path, data: bytes, reason: RejectReason, detail: str
) -> None:
    problem = _read(tmp_path, data)
    assert isinstance(problem, captions.Problem)
    assert problem.reason == reason
    assert detail in problem.detail
    assert "a.txt" in problem.detail


def test_the_longest_caption_is_read(tmp_path: Path) -> None:
    assert _read(tmp_path, b"x" * captions.MAX_CAPTION_BYTES) == "x" * captions.MAX_CAPTION_BYTES


def test_a_missing_caption_is_the_fallback_or_a_problem(tmp_path: Path) -> None:
    assert captions.read(tmp_path / "a.txt", fallback="a photo") == "a photo"
    problem = captions.read(tmp_path / "a.txt", fallback=None)
    assert isinstance(problem, captions.Problem)
    assert problem.reason == RejectReason.CAPTION_MISSING
    assert "a.txt" in problem.detail


def test_a_caption_that_is_a_folder_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "a.txt").mkdir()
    problem = captions.read(tmp_path / "a.txt", fallback="a photo")
    assert isinstance(problem, captions.Problem)
    assert problem.reason == RejectReason.CAPTION_MISSING


@pytest.mark.parametrize(
    ("caption", "trigger", "expected"),
    [
        ("a cat", "ohwx", "ohwx, a cat"),
        ("a photo of ohwx cat", "ohwx", "a photo of ohwx cat"),
        ("a cat", None, "a cat"),
        ("a cat", "", "a cat"),
    ],
)
def test_the_trigger_stands_once(caption: str, trigger: str | None, expected: str) -> None:
    assert captions.with_trigger(caption, trigger) == expected
