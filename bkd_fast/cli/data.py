"""``bkd-fast data``."""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "check a download of a public data set, and arrange it in MVTec AD's layout"
NAMES = ("mvtec", "visa", "btad", "mpdd", "mtd")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", choices=NAMES, metavar="NAME", help=f"{', '.join(NAMES[:-1])} or {NAMES[-1]}")
    parser.add_argument(
        "source", type=Path, nargs="?", metavar="SOURCE", help="the unpacked download (default: say where)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to write; new or empty (default: check only)")
    parser.add_argument("--copy", action="store_true", help="copy files; default: hard links where the disk has them")
    parser.add_argument("--skip-unreadable", action="store_true", help="leave out images with a problem")


def run(arguments: argparse.Namespace) -> None:
    from bkd_fast.data.public import SETS, arrange, check_download, check_paths, count
    from bkd_fast.errors import BKDError

    known, source, out = SETS[arguments.name], arguments.source, arguments.out
    if source is None:
        if out is not None:
            raise BKDError(f"--out needs the download too: bkd-fast data {arguments.name} SOURCE --out {out}")
        print(known.about())
        return
    if out is not None:
        check_paths(source, out)
    items, problems, notes = check_download(arguments.name, source)
    for kind, sentences in (("note", notes), ("problem", problems)):
        for sentence in sentences:
            print(f"{kind}: {sentence}")
    if problems and not arguments.skip_unreadable:
        raise BKDError(f"{len(problems)} problems in {source}: get it again from {known.page}, or --skip-unreadable")
    train, test = (sum(numbers) for numbers in zip(*count(items).values(), strict=True)) if items else (0, 0)
    defective = sum(item.kind != "good" for item in items)
    published = ", as published" if not notes and not problems and (train, test) == known.total else ""
    print(f"{known.title}: {train:,} training and {test:,} test images ({defective:,} defective){published}")
    if out is not None:
        print(arrange(arguments.name, items, out, copy=arguments.copy))
        print(f"licence: {known.licence}; see {known.page}\nnext: bkd-fast train {out} --out RUN")
