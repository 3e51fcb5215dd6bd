"""``gradguard watch`` in a terminal and in a pipe, beside a run that goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from lightning_gradguard import cli
from lightning_gradguard.record.run_history import RunInfo
from lightning_gradguard.record.run_writer import RunWriter
from tests.cli.terminal import command_of, environment_of, gradguard, without
from tests.record.run_folders import write_made_up_run, write_part
from tests.record.runs import made_up_run

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are of POSIX")

OTHER_SCREEN, OWN_SCREEN = b"\x1b[?1049h", b"\x1b[?1049l"
NO_CURSOR, CURSOR = b"\x1b[?25l", b"\x1b[?25h"


@dataclass
class Terminal:
    """A program in a terminal of its own, and what it has written there."""

    program: subprocess.Popen[bytes]
    master: int
    shown: bytes = b""

    def read_until(self, done: Callable[[bytes], bool], seconds: float = 60.0) -> None:
        """Read until what was shown is enough, or the program has ended."""
        end = time.monotonic() + seconds
        while not done(self.shown) and time.monotonic() < end:
            try:
                new = os.read(self.master, 65536)
            except OSError:  # as Linux tells that the program has closed its end
                return
            self.shown += new
            if not new:
                return


@contextmanager
def terminal(folder: Path, *arguments: str, **environment: str) -> Iterator[Terminal]:
    import pty

    master, slave = pty.openpty()
    settings = {"TERM": "xterm-256color", "LINES": "24", "COLUMNS": "80", **environment}
    program = subprocess.Popen(
        command_of(*arguments),
        cwd=folder,
        env=environment_of(settings),
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
    )
    os.close(slave)
    try:
        yield Terminal(program, master)
    finally:
        program.kill()
        program.wait()
        os.close(master)


@contextmanager
def running(folder: Path) -> Iterator[RunWriter]:
    """A run that has taken 100 steps and goes on."""
    run = made_up_run(100)
    info = replace(run.info, status="running", planned_steps=200)
    writer = RunWriter(folder / "gradguard", info)
    write_part(writer, run.optimizers[0])
    writer.flush()
    writer.update(info)
    yield writer
    writer.close()


def end(writer: RunWriter, info: RunInfo | None = None) -> None:
    """Take 50 more steps, and finish."""
    (part,) = made_up_run(150).optimizers
    later = {name: column[100:] for name, column in part.steps.items()}
    write_part(writer, replace(part, steps=later, times=()))
    writer.flush()
    writer.update(replace(info or writer.info, status="finished"))


def test_fills_the_terminal_until_the_run_ends_and_gives_it_back(tmp_path: Path) -> None:
    with running(tmp_path) as writer, terminal(tmp_path, "watch", ".", "--every", "0.1") as tty:
        tty.read_until(lambda shown: b"step 100" in shown and b"encoder.rnn/l0" in shown)
        assert OTHER_SCREEN in tty.shown
        assert OWN_SCREEN not in tty.shown
        before = len(tty.shown)
        end(writer)
        tty.read_until(lambda shown: OWN_SCREEN in shown)
        tty.read_until(lambda _: False)
        assert tty.program.wait(60) == 0

    assert b"step 150" in tty.shown[before:]
    own = tty.shown[tty.shown.rindex(OWN_SCREEN) :]
    assert b"finished" in own  # the last of it stays on the screen
    assert tty.shown.rindex(CURSOR) > tty.shown.rindex(NO_CURSOR)


@pytest.mark.parametrize(
    ("sent", "status"), [(signal.SIGINT, 0), (signal.SIGTERM, 128 + signal.SIGTERM)]
)
def test_a_signal_ends_it_and_the_terminal_is_as_before(
    tmp_path: Path, sent: signal.Signals, status: int
) -> None:
    with running(tmp_path), terminal(tmp_path, "watch", ".", "--every", "0.1") as tty:
        tty.read_until(lambda shown: b"step 100" in shown)
        tty.program.send_signal(sent)
        tty.read_until(lambda _: False)
        assert tty.program.wait(60) == status

    assert tty.shown.rindex(OWN_SCREEN) > tty.shown.rindex(OTHER_SCREEN)
    assert tty.shown.rindex(CURSOR) > tty.shown.rindex(NO_CURSOR)
    assert b"Traceback" not in tty.shown


def test_in_a_pipe_it_is_a_line_for_each_change(tmp_path: Path) -> None:
    with running(tmp_path) as writer:
        program = subprocess.Popen(
            command_of("watch", ".", "--every", "0.1"),
            cwd=tmp_path,
            env=environment_of(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert program.stdout is not None
        first = program.stdout.readline()
        end(writer)
        rest, errors = program.communicate(timeout=60)

    assert first.startswith("step 100 of 200, loss ")
    lines = rest.splitlines()
    assert lines[-2].startswith("step 150 of 200, loss ")
    assert lines[-1] == "finished after 150 steps"
    assert (program.returncode, errors) == (0, "")


def test_once_it_prints_and_ends_while_the_run_goes_on(tmp_path: Path) -> None:
    with running(tmp_path):
        done = gradguard(tmp_path, "watch", ".", "--once")

    assert (done.returncode, done.stderr) == (0, "")
    assert "step 100 of 200" in done.stdout
    assert "\x1b" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_a_run_that_has_ended_is_shown_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_made_up_run(tmp_path, status="failed")

    assert cli.main(["watch", str(tmp_path)]) == 0
    assert capsys.readouterr().out.endswith("failed after 400 steps\n")
    assert cli.main(["watch", str(tmp_path), "--once"]) == 0
    assert "✗ failed" in capsys.readouterr().out


def test_a_run_that_has_yet_to_take_a_step_is_no_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    info = replace(made_up_run().info, status="running")
    writer = RunWriter(tmp_path / "gradguard", info)
    writer.update(info)
    writer.close()

    assert cli.main(["watch", str(tmp_path), "--once"]) == 0
    assert "no step yet" in capsys.readouterr().out


def test_without_rich_one_sentence_says_what_to_install(tmp_path: Path) -> None:
    write_made_up_run(tmp_path)
    done = without({"rich"}, tmp_path, "watch", ".", "--once")

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "gradguard: error: rich is not installed; get it with: "
        "pip install 'lightning-gradguard[report]'\n"
    )
    assert without({"rich"}, tmp_path, "watch", ".").returncode == 0  # plain lines need none


def test_a_terminal_that_cannot_be_drawn_on_gets_lines(tmp_path: Path) -> None:
    write_made_up_run(tmp_path)
    with terminal(tmp_path, "watch", ".", TERM="dumb") as tty:
        tty.read_until(lambda _: False)
        assert tty.program.wait(60) == 0

    assert b"finished after 400 steps" in tty.shown
    assert b"\x1b" not in tty.shown
