"""Tables as plain text where rich is not installed: the part of rich that the commands use. Styles are ignored."""

from __future__ import annotations

from itertools import zip_longest

SIMPLE_HEAD = None  # a style


class Table:
    """Columns of text, two spaces apart."""

    def __init__(self, *columns: str, title: str = "", show_header: bool = True, **_style):
        self._title, self._show_header = title, show_header
        self._columns = list(columns)
        self._rows: list[tuple[str, ...]] = []

    def add_column(self, title: str, **_style):
        self._columns.append(title)

    def add_row(self, *cells: str):
        self._rows.append(cells)

    def __str__(self):
        rows = [self._columns, *self._rows] if self._show_header else self._rows
        lines = [line for row in rows for line in zip_longest(*(cell.split("\n") for cell in row), fillvalue="")]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
        return "\n".join([self._title, *text] if self._title else text)


class Console:
    """Prints on stdout."""

    def __init__(self, **_style):
        pass

    def print(self, what="", **_style):
        print(what)


def Text(text: str) -> str:
    """The text of a cell, unchanged: plain tables have no markup to escape."""
    return text
