"""The report of a run: report.json for programs, report.md for terminals, report.html for eyes; all tell the same."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.report import wording
from compress.report.markdown import markdown
from compress.report.page import page
from compress.report.schema import check

__all__ = ["check", "render"]


def render(report: Mapping[str, Any], folder: Path) -> str:
    """Write report.json, report.md and report.html into `folder`; return the outcome in one sentence.

    All three are drawn up before the first is written, and each appears under its name only when it is whole; raises
    DataError where the report doesn't keep to its schema.
    """
    checked = check(report)
    texts = {
        "report.json": checked.model_dump_json(by_alias=True, indent=2) + "\n",
        "report.md": markdown(checked),
        "report.html": page(checked),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        unfinished = folder / f".{name}.{os.getpid()}"
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(folder / name)
    return wording.verdict(checked)
