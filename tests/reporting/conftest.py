"""Fixtures of tests that look at pages."""

from collections.abc import Iterator

import pytest

from .browser import Page, open_browser


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Iterator[Page]:
    with open_browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened
