"""What tests of pages share: a check that a page is one sound file."""

from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Balanced(HTMLParser):
    """Checks that every element is closed in order, and collects the links and sources."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """A tag closed in itself."""


@pytest.fixture
def sources_of() -> Callable[[str], list[str]]:
    """`sources_of(page)`: assert that a page is sound HTML and needs nothing else; the pictures in it."""

    def check(text: str) -> list[str]:
        page = Balanced(text)
        assert page.open == []
        assert all(source.startswith("data:image/") for source in page.sources)
        assert not re.search(r"<script|<link|@import|url\(", text)
        assert not re.search(r"https?:", re.sub(r"base64,[^\"]+", "", text))
        for svg in re.findall(r"<svg.*?</svg>", text, re.S):
            ElementTree.fromstring(svg)
            assert not re.search(r"\b(nan|inf)\b", "".join(re.findall(r'(?:d|c?x|c?y)="[^"]*"', svg)).lower())
        return page.sources

    return check
