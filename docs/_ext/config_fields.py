"""The directive ``config-fields``: a table of every field of BKDConfig, from its source."""

from __future__ import annotations

import ast
import inspect
import re
from dataclasses import fields
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive

from bkd_fast import config
from bkd_fast.config import PRESETS, BKDConfig


def comments() -> dict[str, str]:
    """Field -> the comment beside it, or on the lines before it."""
    lines = inspect.getsource(BKDConfig).splitlines()
    found = {}
    for statement in ast.parse("\n".join(lines)).body[0].body:
        if not isinstance(statement, ast.AnnAssign):
            continue
        before, line = [], statement.lineno - 2
        while re.match(r" +# (?!.*\)\.$|Training\.)", lines[line]):
            before.insert(0, lines[line].strip("# "))
            line -= 1
        beside = lines[statement.end_lineno - 1].partition("  # ")[2]
        found[statement.target.id] = " ".join([*before, beside]).strip()
    return found


class ConfigFields(Directive):
    """Field, default, the paper preset's value where it differs, and what it is."""

    def run(self) -> list[nodes.Node]:
        said = comments()
        rows = []
        for field in fields(BKDConfig):
            paper = PRESETS["paper"].get(field.name, field.default)
            rows.append(
                (
                    field.name,
                    re.sub(r"Literal\[(.*)\]", r"\1", str(field.type)),
                    repr(field.default),
                    "" if paper == field.default else repr(paper),
                    said[field.name],
                )
            )
        return [_table(("field", "type or choices", "default", "paper", "what it is"), rows)]


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> nodes.table:
    group = nodes.tgroup(cols=len(head))
    group += [nodes.colspec(colwidth=width) for width in (3, 3, 2, 2, 8)]
    for part, lines in ((nodes.thead(), [head]), (nodes.tbody(), rows)):
        for line in lines:
            row = nodes.row()
            for place, text in enumerate(line):
                cell = nodes.literal(text=text) if part.tagname == "tbody" and place < 4 and text else nodes.Text(text)
                row += nodes.entry("", nodes.paragraph("", "", cell))
            part += row
        group += part
    return nodes.table("", group)


def setup(app: Any) -> dict[str, Any]:
    app.add_directive("config-fields", ConfigFields)
    return {"version": "1", "parallel_read_safe": True, "env_version": hash(inspect.getsource(config)) % 10_000}
