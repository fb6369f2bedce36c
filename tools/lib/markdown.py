"""Markdown from texts that may contain anything, such as names of runs."""

import re

from harness.console import printable


def markdown(text):
    """Escape text so that Markdown shows it unchanged; names may contain markup and HTML.

    Addresses do not become links either, as GitHub makes of www.x, http://x and x@y.
    """
    text = "".join(f"\\{c}" if c in "\\`*_{}[]()<>#|!~&" else c for c in printable(text))
    return re.sub(r"(?<=www)\.|:(?=//)|@", r"\\\g<0>", text, flags=re.IGNORECASE)


def markdown_table(heads, rows):
    """A Markdown table with escaped cells.

    Args:
        heads: Titles of the columns, Markdown.
        rows: Lists of texts.
    """
    lines = [heads, ["---"] * len(heads), *([markdown(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown_columns(columns):
    """A Markdown table of what `harness.console.table` takes, {title: {line: text}}."""
    lines = dict.fromkeys(line for column in columns.values() for line in column)
    rows = [[line, *(column.get(line, "") for column in columns.values())] for line in lines]
    return markdown_table(["", *map(markdown, columns)], rows)
