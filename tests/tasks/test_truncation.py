"""Chunks of a batch along time, and states whose graph is cut."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.memory import recursive_detach
from torch import nn

from lightning_gradguard import nn as ours
from lightning_gradguard.tasks import CharacterCorpus, CopyMemory, bptt_chunks, detach_state


class SkipState(NamedTuple):
    hidden: torch.Tensor
    gate: torch.Tensor


@given(steps=st.integers(1, 30), length=st.integers(1, 40), axis=st.sampled_from([0, 1, -2]))
def test_chunks_put_together_are_the_batch(steps, length, axis):
    shape = [3, 4, 2]
    shape[axis] = steps
    batch = torch.arange(torch.tensor(shape).prod().item()).view(shape)

    chunks = list(bptt_chunks(batch, length, axis))

    assert torch.equal(torch.cat(chunks, axis), batch)
    assert all(chunk.shape[axis] == length for chunk in chunks[:-1])
    assert 1 <= chunks[-1].shape[axis] <= length
    assert all(chunk.data_ptr() >= batch.data_ptr() for chunk in chunks)  # views, no copies


def test_tensors_of_a_batch_are_cut_alike_and_those_without_time_come_whole():
    inputs, targets, labels = torch.randn(2, 5, 3), torch.arange(10).view(2, 5), torch.ones(2)

    chunks = list(bptt_chunks([inputs, targets, labels], 2, time_axis=(1, 1, None)))

    assert [tuple(chunk[0].shape) for chunk in chunks] == [(2, 2, 3), (2, 2, 3), (2, 1, 3)]
    assert torch.equal(torch.cat([chunk[1] for chunk in chunks], 1), targets)
    assert all(chunk[2] is labels for chunk in chunks)


def test_gradients_end_at_the_edge_of_a_chunk():
    rnn, x = nn.GRU(2, 3, batch_first=True), torch.randn(1, 6, 2, requires_grad=True)
    state = None
    for chunk in bptt_chunks(x, 4):
        outputs, state = rnn(chunk, detach_state(state))

    outputs.sum().backward()

    assert (x.grad[0, :4] == 0).all()
    assert (x.grad[0, 4:] != 0).all()


def test_chunks_with_a_carried_state_give_the_outputs_of_the_whole():
    rnn, x = nn.LSTM(2, 3, num_layers=2, batch_first=True), torch.randn(4, 7, 2)
    state, outputs = None, []
    for chunk in bptt_chunks(x, 3):
        output, state = rnn(chunk, detach_state(state))
        outputs.append(output)

    torch.testing.assert_close(torch.cat(outputs, 1), rnn(x)[0])


def test_detaching_keeps_structure_and_values():
    weight = torch.ones(2, requires_grad=True)
    grown = weight * 2
    state = {"a": (grown, [grown, None]), "b": SkipState(grown, grown)}

    cut = detach_state(state)

    assert isinstance(cut["a"], tuple)
    assert isinstance(cut["a"][1], list)
    assert isinstance(cut["b"], SkipState)
    assert cut["a"][1][1] is None
    for tensor in (cut["a"][0], cut["a"][1][0], *cut["b"]):
        assert not tensor.requires_grad
        assert tensor.data_ptr() == grown.data_ptr()
    assert grown.requires_grad
    assert detach_state(None) is None


RECURRENT = {
    "lstm": lambda: ours.LSTM(2, 3, 2, residual=True),
    "layer norm gru": lambda: ours.LayerNormGRU(2, 3),
    "skip lstm": lambda: ours.SkipLSTM(2, 3, 2),
    "skip gru": lambda: ours.SkipGRU(2, 3, 2, share_gate=False),
    "dilated": lambda: ours.DilatedRNN(2, 3, 2),
    "temporal skip": lambda: ours.TemporalSkipRNN(2, 3, skip=2),
}


@pytest.mark.parametrize("name", RECURRENT)
def test_chunks_of_every_module_give_the_outputs_of_the_whole(name):
    torch.manual_seed(0)
    rnn, x = RECURRENT[name](), torch.randn(9, 4, 2)
    state, outputs = None, []
    for chunk in bptt_chunks(x, 3, time_axis=0):
        output, state = rnn(chunk, detach_state({"rnn": state})["rnn"])
        outputs.append(output)

    torch.testing.assert_close(torch.cat(outputs), rnn(x)[0])
    assert all(tensor.grad_fn is None for tensor in detach_state(state))


@pytest.mark.parametrize("name", RECURRENT)
def test_lightning_can_take_every_state_apart(name):
    """As it does with what a training step returns."""
    rnn, x = RECURRENT[name](), torch.randn(5, 4, 2)
    state = rnn(x)[1]
    detached = recursive_detach({"state": state})["state"]
    rnn(x, move_data_to_device(detached, "cpu"))
    for tensor, before in zip(detached, state, strict=True):
        assert torch.equal(tensor, before)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ((torch.ones(2, 3), 0), ValueError, "length must be an integer >= 1, got 0"),
        ((("x",), 2), TypeError, "batch must be a tensor or a tuple of tensors, got 'x'"),
        ((torch.ones(3), 2), ValueError, r"time_axis must be an axis of every tensor.*\(3,\)"),
        (((torch.ones(3, 4), torch.ones(3, 5)), 2), ValueError, r"same number of steps.*\[4, 5\]"),
        (((torch.ones(3, 4),) * 2, 2, (1,)), ValueError, r"got \(1,\) for 2 tensors"),
        (((torch.ones(3, 4),), 2, (None,)), ValueError, r"not all None"),
        (((), 2), ValueError, r"same number of steps in every tensor, got \[\]"),
    ],
)
def test_bad_arguments_are_refused_before_the_first_chunk(arguments, kind, message):
    with pytest.raises(kind, match=message):
        bptt_chunks(*arguments)


def test_a_state_of_something_else_is_refused():
    with pytest.raises(TypeError, match="state must be tensors in tuples, lists or dicts"):
        detach_state((torch.ones(1), "x"))


class Truncated(LightningModule):
    """Manual optimization: an optimizer step per chunk, the state carried over."""

    def __init__(self, task, carry):
        super().__init__()
        self.automatic_optimization = False
        self.task, self.carry, self.state = task, carry, None
        self.rnn = nn.LSTM(task.input_size, 4, batch_first=True)
        self.head = nn.Linear(4, task.output_size)

    def training_step(self, batch, batch_idx):
        state = self.state if self.carry else None
        for inputs, targets in bptt_chunks(batch, 10):
            outputs, state = self.rnn(inputs, detach_state(state))
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.task.loss(self.head(outputs), targets))
            optimizer.step()
        self.state = state

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("carry", [False, True])
def test_it_trains_in_lightning(tmp_path, carry):
    sizes = {"train_size": 16, "val_size": 8, "test_size": 8, "batch_size": 8}
    task = CharacterCorpus(length=25, stateful=True, **sizes) if carry else CopyMemory(5, **sizes)
    trainer = Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )

    trainer.fit(Truncated(task, carry), datamodule=task)

    assert trainer.global_step == 2 * 3  # batches of 25 steps, in three chunks each
