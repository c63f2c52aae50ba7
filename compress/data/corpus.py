"""The prose of the built-in corpus: some 11,000 rows (1 MB) that ship with Python, read without importing it.

Rows come from the language reference (`pydoc_data.topics`) and the docstrings of the standard library: paragraphs of
running text, cleaned of markup, code and tables, then cut by turns into single sentences and groups of two to four,
so that lengths vary as they do in use: mostly 5 to 30 words, up to 120. The same Python gives the same rows in the
same order; Python 3.11.7 gives 11,339.
"""

from __future__ import annotations

import ast
import re
import sysconfig
from collections.abc import Iterator
from functools import cache
from itertools import cycle
from pathlib import Path

SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "__pycache__", "encodings"}
LENGTHS = (1, 1, 2, 1, 3, 1, 4)  # sentences a row, in turn
MARKUP = (
    (re.compile(r":[\w:+-]+:`~?([^`<]*?)(?:\s*<[^`>]*>)?`"), r"\1"),  # a role and its text
    (re.compile(r"`([^`<]+?)\s*<[^`>]*>`_{1,2}"), r"\1"),  # a link and its text
    (re.compile(r"``?([^`]+)``?_?"), r"\1"),
    (re.compile(r"(?<!\w)\*\*?([^*\s][^*\n]*?)\*\*?(?!\w)"), r"\1"),
    (re.compile(r"(?<!\w)_([^_\s][^_]*?)_(?!\w)"), r"\1"),
    (re.compile(r"\s*\[\d+\](?:_)?"), ""),  # a footnote
    (re.compile(r"(?<=\w) -- |---?(?= )"), " - "),
    (re.compile(r"\s+"), " "),
)
SENTENCE_END = re.compile(r"(?<=[a-z\d)\"'][.?!])\s+(?=[A-Z\"'(])")
ABBREVIATION = re.compile(r"\b(e\.g|i\.e|etc|vs|cf|resp|approx)\.$")
WORD = re.compile(r"[A-Za-z]+(?:['’-][A-Za-z]+)*[,.;:?!)\"']*$")


@cache
def read_corpus() -> tuple[str, ...]:
    """Return the rows of prose, none of them twice; a few seconds' work, done once in a process."""
    rows: dict[str, None] = {}
    seen: set[str] = set()
    lengths = cycle(LENGTHS)
    for text in texts():
        for paragraph in re.split(r"\n\s*\n", text):
            sentences = [one for one in split_sentences(paragraph) if one.lower() not in seen]
            seen.update(one.lower() for one in sentences)
            while sentences:
                size = next(lengths)
                rows[" ".join(sentences[:size])] = None
                sentences = sentences[size:]
    return tuple(rows)


def texts() -> Iterator[str]:
    """Yield the topics of the language reference, then every docstring of the standard library, by path."""
    folder = Path(sysconfig.get_path("stdlib"))
    for path in sorted(folder.rglob("*.py"), key=lambda path: path.relative_to(folder).as_posix()):
        if not SKIPPED.isdisjoint(path.relative_to(folder).parts):
            continue
        source = path.read_text(encoding="utf-8", errors="replace")
        if path.match("pydoc_data/topics.py"):
            yield from string_values(ast.parse(source))
        elif '"""' in source or "'''" in source:
            yield from docstrings(ast.parse(source))


def string_values(tree: ast.AST) -> Iterator[str]:
    """Yield the values of the dictionary that `pydoc_data.topics` consists of."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            for value in node.values:
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield value.value


def docstrings(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    """Yield the docstrings of a module, class or function and of what is defined in it, in their order."""
    text = ast.get_docstring(node)
    if text:
        yield text
    for inner in node.body:
        if isinstance(inner, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from docstrings(inner)


def split_sentences(paragraph: str) -> list[str]:
    """Return the sentences of a paragraph of prose; code, tables and headings give none."""
    text = paragraph
    for pattern, replacement in MARKUP:
        text = pattern.sub(replacement, text)
    found: list[str] = []
    for part in SENTENCE_END.split(text.strip()):
        if found and ABBREVIATION.search(found[-1]):
            found[-1] += " " + part
        else:
            found.append(part)
    return [sentence for sentence in found if is_prose(sentence)]


def is_prose(sentence: str) -> bool:
    """Whether it begins and ends as a sentence of 5 to 60 words does, nearly all of them plain words."""
    words = sentence.split()
    plain = sum(bool(WORD.fullmatch(word)) for word in words)
    return (
        5 <= len(words) <= 60
        and sentence[0].isupper()
        and sentence[-1] in ".?!"
        and plain >= 0.85 * len(words)
        and not re.search(r"[<>={}\[\]|\\#@`]|__|\.\.|::", sentence)
    )
