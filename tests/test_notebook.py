"""What a notebook shows of results."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmette import CompletedProcess
from vmette.process import SHOWN_BYTES


class Shown(HTMLParser):
    """The elements of a page, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert not attrs
        self.elements.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


HOSTILE = "</pre><script>alert(document.cookie)</script><img src=x onerror='x'>&lt;\"'"


@pytest.mark.parametrize("output", [HOSTILE, HOSTILE.encode()])
def test_output_is_text_whatever_it_says(output: str | bytes) -> None:
    shown = Shown(CompletedProcess(("sh", "-c", HOSTILE), 3, output, output)._repr_html_())  # type: ignore[type-var]
    assert shown.elements == ["div", "code", "br", "pre", "br", "pre"]
    assert shown.text.count(HOSTILE) == 2
    assert "returned 3" in shown.text


@given(st.binary(), st.lists(st.text()))
def test_any_output(output: bytes, args: list[str]) -> None:
    shown = Shown(CompletedProcess(tuple(args), 0, output, b"")._repr_html_())
    assert shown.elements == ["div", "code", *(["br", "pre"] if output else [])]


def test_a_notebook_is_not_flooded() -> None:
    html = CompletedProcess(("yes",), 0, b"<" * 10_000_000 + b"end", b"")._repr_html_()
    assert len(html) < SHOWN_BYTES * len("&lt;") + 200
    assert "the last 16384 of 10000003" in html
    assert html.endswith("end</pre></div>")


def test_nothing_is_shown_of_nothing() -> None:
    assert Shown(CompletedProcess(("true",), 0, b"", b"")._repr_html_()).elements == ["div", "code"]
