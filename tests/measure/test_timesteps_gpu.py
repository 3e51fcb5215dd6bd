"""What differs on a GPU: kernels that cannot be replayed, half precision, and waiting for it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from lightning_gradguard.measure.timesteps import TimestepProbe
from tests.measure.time_readings import KINDS, I


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    for kind in KINDS.values():
        rnn = kind(I, 16, num_layers=2, device="cuda")
        x = torch.randn(20, 8, I, device="cuda")
        with TimestepProbe(rnn) as probe:
            rnn(x)[0][-1].pow(2).sum().backward()
            readings = probe.measure()
            assert [reading.note for reading in readings] == ["", ""]
            cpu = copy.deepcopy(rnn).cpu()
            with TimestepProbe(cpu) as other:
                cpu(x.cpu())[0][-1].pow(2).sum().backward()
                expected = other.measure()
        for ours, theirs in zip(readings, expected, strict=True):
            assert ours.decay_rate == pytest.approx(theirs.decay_rate, rel=1e-3)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_cheap_measurement_never_waits_for_a_gpu() -> None:
    rnn = nn.LSTM(I, 16, device="cuda")
    x = torch.randn(20, 8, I, device="cuda")
    packed = pack_padded_sequence(x, torch.arange(20, 12, -1))
    with TimestepProbe(rnn) as probe:
        probe.exact = False
        rnn(x)[0].sum().backward()
        probe.collect()
        torch.cuda.set_sync_debug_mode("error")
        try:
            rnn(x)[0].sum().backward()
            rnn(packed)[0].data.sum().backward()
            snapshot = probe.collect()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert snapshot.decode(snapshot.values.tolist())


@pytest.mark.gpu
def test_dropout_on_a_gpu_is_not_replayed_wrongly() -> None:
    rnn = nn.LSTM(I, 16, num_layers=2, dropout=0.5, device="cuda")
    with TimestepProbe(rnn) as probe:
        rnn(torch.randn(20, 8, I, device="cuda"))[0][-1].sum().backward()
        (reading,) = probe.measure()
    assert reading.source == "input"
    assert "cannot be replayed" in reading.note


@pytest.mark.gpu
def test_half_precision_with_a_scaler() -> None:
    rnn = nn.LSTM(I, 16, device="cuda")
    x = torch.randn(20, 8, I, device="cuda")
    scaler = torch.amp.GradScaler("cuda")
    rates = []
    for enabled in (False, True):
        with TimestepProbe(rnn) as probe:
            with torch.autocast("cuda", torch.float16, enabled=enabled):
                loss = rnn(x)[0][-1].float().pow(2).mean()
            (scaler.scale(loss) if enabled else loss).backward()
            rates.append(probe.measure()[0].decay_rate)
    assert rates[1] == pytest.approx(rates[0], rel=0.05)
