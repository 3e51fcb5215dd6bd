"""Reading what is appended to a file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gradguard.cli.tail import Tail


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.binary(max_size=12), st.booleans()), max_size=12))
def test_every_whole_line_is_read_once(tmp_path_factory, pieces):
    path = tmp_path_factory.mktemp("tail") / "log"
    tail, read = Tail(path), b""
    for piece, look in pieces:
        with path.open("ab") as file:
            file.write(piece)
        new = tail.poll() if look else None
        read += b"".join(new.lines) if new else b""
    new = tail.poll()
    read += b"".join(new.lines) if new else b""

    whole = path.read_bytes() if path.exists() else b""
    assert read == whole[: whole.rfind(b"\n") + 1]


def test_a_file_that_is_replaced_is_begun_again(tmp_path):
    path, other = tmp_path / "log", tmp_path / "new"
    path.write_bytes(b"1\n2\n3\n")
    tail = Tail(path)
    assert tail.poll().afresh

    other.write_bytes(b"1\n3\n4\n5\n")  # longer than the first, as one that was thinned may be
    other.replace(path)
    new = tail.poll()
    assert (new.afresh, new.lines) == (True, [b"1\n", b"3\n", b"4\n", b"5\n"])
    with path.open("ab") as file:
        file.write(b"6\n")
    new = tail.poll()
    assert (new.afresh, new.lines) == (False, [b"6\n"])

    os.truncate(path, 4)
    new = tail.poll()
    assert (new.afresh, new.lines) == (True, [b"1\n", b"3\n"])


def test_of_a_long_file_only_the_end_is_read_at_first(tmp_path):
    path = tmp_path / "log"
    path.write_bytes(b"".join(b"%d\n" % n for n in range(100_000)))
    tail = Tail(path, max_bytes=20)

    assert tail.poll().lines == [b"99997\n", b"99998\n", b"99999\n"]
    assert tail.poll() is None


def test_a_file_that_comes_and_goes(tmp_path):
    path = tmp_path / "log"
    tail = Tail(path)
    assert tail.poll() is None
    path.write_bytes(b"a\n")
    assert tail.poll().lines == [b"a\n"]
    path.unlink()
    gone = tail.poll()
    assert (gone.afresh, gone.lines) == (True, [])
    assert tail.poll() is None
    path.write_bytes(b"a\n")
    assert tail.poll().lines == [b"a\n"]


def test_a_file_that_has_not_changed_is_not_opened(tmp_path, monkeypatch):
    path = tmp_path / "log"
    path.write_bytes(b"a\n")
    tail = Tail(path)
    tail.poll()
    monkeypatch.setattr(Path, "open", lambda *_, **__: pytest.fail("opened"))

    assert tail.poll() is None
