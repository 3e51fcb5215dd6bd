"""Every `python` block of the documents runs as it stands, and every file they point to exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    "docs/guide.md",
    "docs/through-time.md",
    "docs/findings.md",
    "docs/remedies.md",
    "docs/recurrent.md",
    "docs/history.md",
    "docs/plots.md",
)

PYTHON_BLOCK = re.compile(r"^```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?P<target>[^)#]+)[^)]*\)")


def python_blocks(text: str) -> list[tuple[int, str]]:
    """(line of its first statement, code) of each block."""
    return [
        (text.count("\n", 0, match.start("code")) + 1, match["code"])
        for match in PYTHON_BLOCK.finditer(text)
    ]


BLOCKS = [
    pytest.param(name, line, code, id=f"{name}:{line}")
    for name in DOCUMENTS
    for line, code in python_blocks((CHECKOUT / name).read_text(encoding="utf-8"))
]


def run_block(name: str, line: int, code: str) -> None:
    # Blank lines in front, so that a traceback shows the line of the document.
    # As a script, because a dataclass looks its module up by name.
    exec(compile("\n" * (line - 1) + code, name, "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize(("name", "line", "code"), BLOCKS)
def test_block_runs_as_it_stands(name, line, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    run_block(name, line, code)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_each_document_has_a_block_to_run(name):
    assert [block for block in BLOCKS if block.values[0] == name]


def test_a_wrong_block_fails_at_its_line():
    text = "# Title\n\n```python\nx = 1\nassert x == 2\n```\n"
    ((line, code),) = python_blocks(text)

    with pytest.raises(AssertionError) as raised:
        run_block("example.md", line, code)

    assert raised.traceback[-1].lineno == 4  # counted from 0: the fifth line


def test_text_blocks_are_not_run():
    assert python_blocks("```text\nmake demo\n```\n") == []


@pytest.mark.parametrize("name", [*DOCUMENTS, "CHANGELOG.md"])
def test_links_to_files_lead_somewhere(name):
    text = (CHECKOUT / name).read_text(encoding="utf-8")
    targets = {match["target"] for match in LINK.finditer(text)}

    folder = (CHECKOUT / name).parent
    missing = {t for t in targets if "://" not in t and not (folder / t).exists()}
    assert missing == set()
