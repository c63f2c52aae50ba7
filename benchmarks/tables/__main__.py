"""Writes the page of figures."""

from benchmarks.tables import PAGE, page

PAGE.write_text(page())
