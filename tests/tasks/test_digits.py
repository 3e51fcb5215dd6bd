"""Digits as sequences of pixels."""

from __future__ import annotations

import gzip
import math
import sys

import pytest
import torch
from sklearn.datasets import load_digits

from lightning_gradguard.tasks import SequentialDigits, SequentialMNIST
from tests.tasks.small import write_idx, write_mnist

MNIST = {"train_size": 20, "val_size": 12, "test_size": 8}


def images_of(split):
    return split.batch()[0].squeeze(-1)


def test_digits_are_all_of_scikit_learns_once():
    task = SequentialDigits()
    splits = [task.split(name).batch() for name in ("train", "val", "test")]
    found = [
        (*pixels, label)
        for inputs, targets in splits
        for pixels, label in zip(
            (inputs.squeeze(-1) * 16).int().tolist(), targets.tolist(), strict=True
        )
    ]

    pixels, labels = load_digits(return_X_y=True)
    assert sorted(found) == sorted(
        (*map(int, image), int(label)) for image, label in zip(pixels, labels, strict=True)
    )


def test_permuting_moves_the_pixels_of_every_image_alike():
    plain, permuted = SequentialDigits(), SequentialDigits(permuted=True)

    assert sorted(permuted.permutation.tolist()) == list(range(64))
    assert plain.permutation.tolist() == list(range(64))
    assert permuted.permutation.tolist() != list(range(64))
    assert SequentialDigits(True, seed=1).permutation.tolist() != permuted.permutation.tolist()
    for name in ("train", "val", "test"):
        expected = images_of(plain.split(name))[:, permuted.permutation]
        assert torch.equal(images_of(permuted.split(name)), expected)


def test_digits_baseline_is_the_entropy_of_their_classes():
    _, targets = SequentialDigits().split("train").batch()
    shares = torch.bincount(targets) / len(targets)

    assert float(-(shares * shares.log()).sum()) == pytest.approx(
        SequentialDigits().baseline, abs=0.01
    )


def test_more_digits_than_there_are_is_refused():
    with pytest.raises(
        ValueError, match="train_size, val_size and test_size must not exceed 1797 images"
    ):
        SequentialDigits(train_size=1_700)


def test_without_scikit_learn_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)

    with pytest.raises(ModuleNotFoundError, match="not installed: pip install scikit-learn"):
        SequentialDigits().setup()


# -- MNIST ----------------------------------------------------------------------------------------


def test_mnist_splits_its_files_in_their_order(tmp_path):
    task = SequentialMNIST(write_mnist(tmp_path), **MNIST)

    firsts = {name: images_of(task.split(name))[:, 0] * 255 for name in ("train", "val", "test")}

    torch.testing.assert_close(firsts["train"], torch.arange(20.0))
    torch.testing.assert_close(firsts["val"], torch.arange(20.0, 32.0))
    torch.testing.assert_close(firsts["test"], torch.arange(8.0))
    assert task.split("val").batch()[1].tolist() == [n % 10 for n in range(20, 32)]
    assert task.baseline == pytest.approx(math.log(10))


def test_mnist_reads_packed_files_and_a_folder_that_holds_them(tmp_path):
    folder = write_mnist(tmp_path) / "MNIST" / "raw"
    expected = images_of(SequentialMNIST(tmp_path, **MNIST).split("train"))
    for path in sorted(folder.iterdir()):
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()

    assert torch.equal(images_of(SequentialMNIST(tmp_path, **MNIST).split("train")), expected)
    assert torch.equal(images_of(SequentialMNIST(str(folder), **MNIST).split("train")), expected)


@pytest.mark.parametrize("keep", [slice(0, 30), slice(9, None)], ids=["cut short", "no gzip"])
def test_a_broken_packed_file_is_named(tmp_path, keep):
    folder = write_mnist(tmp_path) / "MNIST" / "raw"
    path = next(folder.glob("train-images*"))
    packed = gzip.compress(path.read_bytes())
    path.with_name(f"{path.name}.gz").write_bytes(packed[keep])
    path.unlink()

    with pytest.raises(ValueError, match=r"path must be a whole gzip file, got .*train-images"):
        SequentialMNIST(tmp_path, **MNIST).split("train")


def test_mnist_is_permuted_alike_in_every_split(tmp_path):
    write_mnist(tmp_path)
    plain = SequentialMNIST(tmp_path, **MNIST)
    permuted = SequentialMNIST(tmp_path, permuted=True, **MNIST)

    for name in ("train", "val", "test"):
        expected = images_of(plain.split(name))[:, permuted.permutation]
        assert torch.equal(images_of(permuted.split(name)), expected)


@pytest.mark.parametrize("missing", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_a_missing_file_of_mnist_is_named_with_the_way_to_get_it(tmp_path, missing):
    (write_mnist(tmp_path) / "MNIST" / "raw" / missing).unlink()

    with pytest.raises(FileNotFoundError, match=rf"root must hold MNIST/raw/{missing} .*download"):
        SequentialMNIST(tmp_path)


def test_a_torn_file_of_mnist_is_refused(tmp_path):
    path = write_mnist(tmp_path) / "MNIST" / "raw" / "train-images-idx3-ubyte"
    whole = path.read_bytes()

    for torn in (whole[:-1], whole[:3], b"", b"<html>" + whole, whole + b"\0"):
        path.write_bytes(torn)
        with pytest.raises(ValueError, match="path must be a whole IDX file"):
            SequentialMNIST(tmp_path, **MNIST).setup()


def test_images_of_another_shape_are_refused(tmp_path):
    path = write_mnist(tmp_path) / "MNIST" / "raw" / "train-images-idx3-ubyte"
    write_idx(path, torch.zeros(32, 8, 8, dtype=torch.uint8))

    with pytest.raises(ValueError, match=r"images of 28x28 pixels as labels.*\(32, 8, 8\)"):
        SequentialMNIST(tmp_path, **MNIST).setup()


def test_more_images_than_a_file_holds_are_refused(tmp_path):
    write_mnist(tmp_path)

    with pytest.raises(ValueError, match="train_size and val_size must not exceed 32 images"):
        SequentialMNIST(tmp_path, **{**MNIST, "val_size": 13}).setup("fit")
    with pytest.raises(ValueError, match="test_size must not exceed 8 images"):
        SequentialMNIST(tmp_path, **{**MNIST, "test_size": 9}).setup("test")
