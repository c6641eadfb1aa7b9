"""The directive ``config-fields``: a table of every option of BKDConfig."""

from __future__ import annotations

import inspect
import re
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive

from bkd_fast import config
from bkd_fast.config import GROUPS, BKDConfig, options


class ConfigFields(Directive):
    """Option, type, default, the paper preset's value where it differs, and what it is."""

    def run(self) -> list[nodes.Node]:
        paper = BKDConfig.preset("paper")
        found: list[nodes.Node] = []
        for name, kinds in GROUPS.items():
            for kind in kinds:
                title = name if kind.kind is None else f"{name} = {kind.kind}"
                group = getattr(paper, name)
                rows = []
                for each in options(kind):
                    own = getattr(group, each.name) if isinstance(group, kind) else each.default
                    rows.append(
                        (
                            f"{name}.{each.name}",
                            re.sub(r"Literal\[(.*)\]", r"\1", str(each.type)),
                            repr(each.default),
                            "" if own == each.default else repr(own),
                            each.metadata["text"],
                        )
                    )
                found += [nodes.rubric("", title), nodes.paragraph("", (kind.__doc__ or "").splitlines()[0])]
                found.append(_table(("option", "type or choices", "default", "paper", "what it is"), rows))
        return found


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> nodes.table:
    group = nodes.tgroup(cols=len(head))
    group += [nodes.colspec(colwidth=width) for width in (3, 3, 2, 2, 8)]
    for part, lines in ((nodes.thead(), [head]), (nodes.tbody(), rows)):
        for line in lines:
            row = nodes.row()
            for column, text in enumerate(line):
                code = part.tagname == "tbody" and column < 4 and text
                cell = nodes.literal(text=text) if code else nodes.Text(text)
                row += nodes.entry("", nodes.paragraph("", "", cell))
            part += row
        group += part
    return nodes.table("", group)


def setup(app: Any) -> dict[str, Any]:
    app.add_directive("config-fields", ConfigFields)
    return {"version": "1", "parallel_read_safe": True, "env_version": hash(inspect.getsource(config)) % 10_000}
