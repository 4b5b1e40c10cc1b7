"""Real text that is on any machine that can run the demo.

General text: docstrings, comment blocks and help topics of Python's standard library.
Narrow text:  licence files of the installed Python packages, of Python and, where there, of the
              system (/usr/share/common-licenses).

Files are read in sorted order and paragraphs are deduplicated, so one machine always gives the same
corpus. A paragraph that talks about licences is dropped from the general text: the base model has
never seen the narrow domain.
"""

import ast
import hashlib
import re
import sysconfig
import warnings
from dataclasses import dataclass
from pathlib import Path

MIN_GENERAL_CHARS = 1_200_000
MIN_NARROW_PARAGRAPHS = 400
HELD_OUT_PERCENT = 10

SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"}
LICENCE_FILE = re.compile(r"^(licen[sc]es?|copying|notice)\b", re.IGNORECASE)
LICENCE_WORDS = re.compile(
    r"licen[sc]e|copyright|warrant|liabilit|redistribut|copying this software", re.IGNORECASE
)
SYSTEM_LICENCES = Path("/usr/share/common-licenses")
TYPOGRAPHY = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"'})
COMMENT_BLOCK = re.compile(r"(?:^[ \t]*#(?: .*)?\n){2,}", re.MULTILINE)


@dataclass
class Corpus:
    """General text as one string per source file, narrow text as paragraphs."""

    general_train: list[str]
    general_held: list[str]
    narrow_train: list[str]
    narrow_held: list[str]

    def describe(self) -> str:
        def size(texts):
            return f"{sum(map(len, texts)) / 1e6:.2f} MB"

        return (
            f"general: {len(self.general_train)} files, {size(self.general_train)}"
            f" (held out: {len(self.general_held)}, {size(self.general_held)}); "
            f"narrow: {len(self.narrow_train)} paragraphs, {size(self.narrow_train)}"
            f" (held out: {len(self.narrow_held)}, {size(self.narrow_held)})"
        )


def gather() -> Corpus:
    general_train, general_held = [], []
    for name, text in _general_texts(Path(sysconfig.get_path("stdlib"))):
        (general_held if _is_held_out(name) else general_train).append(text)

    narrow_train, narrow_held = [], []
    for paragraph in _narrow_paragraphs():
        # Split by content: a paragraph that many licences share is wholly on one side.
        (narrow_held if _is_held_out(paragraph) else narrow_train).append(paragraph)

    corpus = Corpus(general_train, general_held, narrow_train, narrow_held)
    _require(corpus)
    return corpus


def _require(corpus: Corpus) -> None:
    general = sum(map(len, corpus.general_train))
    if general < MIN_GENERAL_CHARS:
        raise SystemExit(
            f"demo: only {general} characters of prose in the standard library at "
            f"{sysconfig.get_path('stdlib')}, need {MIN_GENERAL_CHARS}; "
            "use a Python whose .py files with docstrings are installed"
        )
    if len(corpus.narrow_train) < MIN_NARROW_PARAGRAPHS:
        raise SystemExit(
            f"demo: only {len(corpus.narrow_train)} licence paragraphs in "
            f"{sysconfig.get_path('purelib')}, need {MIN_NARROW_PARAGRAPHS}; "
            "install requirements.txt with its packages' metadata (*.dist-info)"
        )


def _general_texts(stdlib: Path):
    """(relative path, prose of that file) for each module, duplicates removed."""
    seen: set[str] = set()
    for path in sorted(stdlib.rglob("*.py")):
        relative = path.relative_to(stdlib)
        if SKIPPED_FOLDERS.intersection(relative.parts):
            continue
        source = path.read_text(encoding="utf-8", errors="replace")
        paragraphs = []
        for block in _prose_blocks(source):
            for paragraph in _paragraphs(block):
                if paragraph not in seen and not LICENCE_WORDS.search(paragraph):
                    seen.add(paragraph)
                    paragraphs.append(paragraph)
        if paragraphs:
            yield relative.as_posix(), "\n\n".join(paragraphs)


def _prose_blocks(source: str):
    """Docstrings and other long strings (pydoc's help topics are such), then comment blocks."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old files
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) > 60:
            yield node.value
    for match in COMMENT_BLOCK.finditer(source):
        yield re.sub(r"^[ \t]*# ?", "", match.group(), flags=re.MULTILINE)


def _narrow_paragraphs():
    site_packages = Path(sysconfig.get_path("purelib"))
    files = sorted(p for p in site_packages.rglob("*") if LICENCE_FILE.match(p.name))
    files += sorted(Path(sysconfig.get_path("stdlib")).glob("LICENSE*"))
    if SYSTEM_LICENCES.is_dir():
        files += sorted(p for p in SYSTEM_LICENCES.iterdir() if not p.is_symlink())
    seen: set[str] = set()
    for path in files:
        if path.suffix in {".py", ".pyc"} or not path.is_file():
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        text = re.sub(r"^[ \t]*(?:/\*+|\*+/?|#+|//+)", "", text, flags=re.MULTILINE)  # comments
        for paragraph in _paragraphs(text):
            key = re.sub(r"\W+", "", paragraph).lower()
            if key not in seen:
                seen.add(key)
                yield paragraph


def _paragraphs(text: str):
    """Paragraphs of running prose, each on one line; code, tables and other scripts are left."""
    text = text.translate(TYPOGRAPHY)
    for block in re.split(r"\n\s*\n", text):
        line = " ".join(block.split())
        if len(line) < 80 or ">>>" in line or not line.isascii():
            continue
        plain = sum(c.isalpha() or c == " " for c in line)
        if plain >= 0.88 * len(line) and line.count(" ") >= len(line) / 12:
            yield line


def _is_held_out(key: str) -> bool:
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT
