"""Tables where rich is not installed."""

import pytest

from cna_kernels.model.cli import plain

TABLES = [
    (dict(), ["a", "long"], [("1", "2"), ("333", "4")], "a    long\n1    2\n333  4"),
    (dict(title="counts"), ["n"], [("1",)], "counts\nn\n1"),
    (dict(show_header=False), [], [("name", "x"), ("y", "two\nlines")], "name  x\ny     two\n      lines"),
    (dict(show_header=False), [], [], ""),
]


@pytest.mark.parametrize(("style", "columns", "rows", "text"), TABLES)
def test_tables(style, columns, rows, text, capsys):
    table = plain.Table(*columns[:1], **style)
    for title in columns[1:]:
        table.add_column(title, no_wrap=True)
    for row in rows:
        table.add_row(*row)
    plain.Console(highlight=False).print(table, markup=False)
    assert capsys.readouterr().out == text + "\n"
