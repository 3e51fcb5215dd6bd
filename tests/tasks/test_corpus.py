"""Text, character by character."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Trainer

from lightning_gradguard.tasks import CharacterCorpus
from lightning_gradguard.tasks.corpus import UNKNOWN

SIZES = {"train_size": 24, "val_size": 8, "test_size": 8, "batch_size": 4}
TEXT = "".join(chr(97 + (7 * n * n + n // 5) % 23) for n in range(1000))


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


def text_of(task, name):
    """The inputs of a split as text, in the order of its rows."""
    inputs, _ = task.split(name).batch()
    return task.decode(inputs.argmax(-1) if inputs.dim() == 3 else inputs)


def test_splits_follow_each_other_in_the_text(path):
    task = CharacterCorpus(path, 10, **SIZES)

    assert text_of(task, "train") == TEXT[:240]
    assert text_of(task, "val") == TEXT[240:320]
    assert text_of(task, "test") == TEXT[320:400]


def test_targets_are_the_next_characters_beyond_the_window_too(path):
    task = CharacterCorpus(path, 10, **SIZES)
    _, targets = task.split("train").batch()

    assert task.decode(targets) == TEXT[1:241]


def test_without_sizes_the_whole_text_is_used(path):
    task = CharacterCorpus(path, 10, batch_size=4)

    assert (task.train_size, task.val_size, task.test_size) == (91, 4, 4)  # of 99 windows


@given(
    batch_size=st.integers(1, 6), per_row=st.integers(1, 4), left=st.integers(0, 5),
    length=st.integers(1, 7),
)  # fmt: skip
def test_a_stateful_row_goes_on_where_it_ended(tmp_path_factory, batch_size, per_row, left, length):
    file = tmp_path_factory.mktemp("stream") / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    windows = batch_size * per_row + min(left, batch_size - 1)
    task = CharacterCorpus(
        file, length, stateful=True, one_hot=False, batch_size=batch_size,
        train_size=windows, val_size=batch_size, test_size=batch_size,
    )  # fmt: skip

    batches = list(task.train_dataloader())

    assert len(batches) == per_row
    assert all(inputs.shape == (batch_size, length) for inputs, _ in batches)
    for (_, targets), (inputs, _) in pairwise(batches):
        assert torch.equal(targets[:, -1], inputs[:, 0])
    rows = torch.cat([inputs for inputs, _ in batches], dim=1)
    streams = [TEXT[n : n + per_row * length] for n in range(0, len(TEXT), per_row * length)]
    assert [task.decode(row) for row in rows] == streams[:batch_size]
    assert [task.decode(batch[0]) for batch in task.train_dataloader()] == [
        task.decode(batch[0]) for batch in batches
    ]


def test_streams_are_not_shared_out_among_processes(path):
    class TwoProcesses(Trainer):
        world_size = 2

    task = CharacterCorpus(path, 10, stateful=True, **SIZES)
    task.trainer = TwoProcesses(accelerator="cpu", logger=False, enable_checkpointing=False)

    for loader in (task.train_dataloader, task.val_dataloader):
        with pytest.raises(ValueError, match="stateful must be False with more than one process"):
            loader()


def test_vocabulary_is_of_the_training_part_and_the_rest_is_unknown(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("abca" * 5 + "aéb𝄞" + "zabc" + "c", encoding="utf-8")
    task = CharacterCorpus(file, 4, batch_size=1, train_size=5, val_size=1, test_size=1)

    assert task.vocabulary == UNKNOWN + "abc"
    assert task.input_size == task.output_size == task.classes == 4
    assert text_of(task, "val") == f"a{UNKNOWN}b{UNKNOWN}"
    assert text_of(task, "test") == f"{UNKNOWN}abc"
    assert task.decode(task.split("val").batch()[1]) == f"{UNKNOWN}b{UNKNOWN}{UNKNOWN}"


def test_baseline_is_the_entropy_of_single_characters_in_training(path):
    task = CharacterCorpus(path, 10, **SIZES)
    counts = Counter(TEXT[:240])
    entropy = -sum(n / 240 * math.log(n / 240) for n in counts.values())

    assert task.baseline == pytest.approx(entropy)
    # What it costs to know how often each character comes, on the training part itself.
    inputs, _ = task.split("train").batch()
    shares = torch.tensor([counts[c] / 240 for c in task.vocabulary]).log().clamp(min=-1e4)
    targets = inputs.argmax(-1)
    outputs = shares.expand(*targets.shape, -1)
    assert float(task.loss(outputs, targets)) == pytest.approx(entropy, rel=1e-5)


def test_the_standard_library_is_there_by_default_and_nearly_ascii():
    task = CharacterCorpus()

    inputs, targets = next(iter(task.val_dataloader()))
    assert inputs.shape == (64, 100, task.input_size)
    assert 90 < task.input_size < 200
    assert task.train_size > 5_000
    assert 2.5 < task.baseline < 3.5
    assert float((targets == 0).float().mean()) < 0.01
    assert "def " in text_of(task, "test")


def test_the_seed_changes_the_order_and_not_the_text(path):
    one, other = (CharacterCorpus(path, 10, seed=seed, **SIZES) for seed in (0, 1))

    assert text_of(one, "train") == text_of(other, "train")
    first = [task.decode(next(iter(task.train_dataloader()))[1]) for task in (one, other)]
    assert first[0] != first[1]


@pytest.mark.parametrize("text", ["", "a", "abcdefgh"])
def test_a_text_that_is_too_short_says_how_long_it_must_be(tmp_path, text):
    file = tmp_path / "short.txt"
    file.write_text(text, encoding="utf-8")

    with pytest.raises(ValueError, match="path must hold at least 13 characters for 3 windows"):
        CharacterCorpus(file, 4)


def test_a_file_that_is_no_text_is_named(tmp_path):
    file = tmp_path / "picture.png"
    file.write_bytes(b"\x89PNG\xff" * 99)

    with pytest.raises(ValueError, match=r"path must be a text file in UTF-8, got .*picture\.png"):
        CharacterCorpus(file, 4)


def test_bad_arguments_say_what_is_allowed(path):
    with pytest.raises(FileNotFoundError, match="path must be a text file, got 'nowhere'"):
        CharacterCorpus("nowhere")
    with pytest.raises(TypeError, match="path must be a text file or None, got 3"):
        CharacterCorpus(3)
    with pytest.raises(ValueError, match="length must be an integer >= 1, got 0"):
        CharacterCorpus(path, 0)
    with pytest.raises(TypeError, match="stateful must be True or False, got 'yes'"):
        CharacterCorpus(path, stateful="yes")
    with pytest.raises(ValueError, match="path must hold at least 3161 characters for 316 windows"):
        CharacterCorpus(path, 10, **{**SIZES, "train_size": 300})
    with pytest.raises(ValueError, match="batch_size must be at most the windows of the smallest"):
        CharacterCorpus(path, 10, stateful=True, **{**SIZES, "batch_size": 9})
