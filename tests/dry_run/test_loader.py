"""A preflight takes batches from a loader and leaves the loader as it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradguard.dry_run import preflight
from tests.models import assert_same_bits


@pytest.mark.parametrize("own_generator", [True, False])
@pytest.mark.parametrize("shuffle", [True, False])
def test_a_loader_goes_on_as_if_it_was_not_read(shuffle: bool, own_generator: bool) -> None:
    generator = torch.Generator().manual_seed(5) if own_generator else None
    data = TensorDataset(torch.arange(12.0).unsqueeze(1))
    batches = DataLoader(data, batch_size=2, shuffle=shuffle, generator=generator)
    epoch = iter(batches)
    next(epoch)
    model = nn.Linear(1, 1)
    states = torch.get_rng_state(), None if generator is None else generator.get_state()

    preflight(model, batches, loss=lambda m, x: m(x[0]).sum(), verbose=False)

    assert_same_bits(torch.get_rng_state(), states[0])
    if generator is not None:
        assert_same_bits(generator.get_state(), states[1])
    assert len(list(epoch)) == 5


def test_a_dataset_with_random_numbers_of_its_own_goes_on_as_well() -> None:
    class Noise(torch.utils.data.Dataset[Tensor]):
        def __init__(self) -> None:
            self.generator = np.random.default_rng(0)

        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> Tensor:
            return torch.tensor([self.generator.random()], dtype=torch.float32)

    data = Noise()
    preflight(nn.Linear(1, 1), DataLoader(data), loss=lambda m, x: m(x).sum(), verbose=False)
    assert data.generator.random() == np.random.default_rng(0).random()


def test_the_data_of_a_loader_is_not_copied() -> None:
    class Changing(torch.utils.data.Sampler[int]):
        """Counts its epochs, as samplers do that shuffle by epoch."""

        def __init__(self, data: Any) -> None:
            self.data, self.epoch = data, 0

        def __iter__(self) -> Any:
            self.epoch += 1
            return iter(range(len(self.data)))

        def __len__(self) -> int:
            return len(self.data)

    data = [torch.ones(1), torch.ones(1)]
    sampler = Changing(data)
    batches = DataLoader(data, sampler=sampler)  # type: ignore[arg-type]

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        data[1].fill_(5.0)  # would be put back from a copy
        return model(batch).sum()

    preflight(nn.Linear(1, 1), batches, loss=loss, verbose=False)
    assert data[1].item() == 5.0
    assert sampler.epoch == 0


def test_an_epoch_under_way_in_persistent_workers_goes_on() -> None:
    batches: DataLoader[Tensor] = DataLoader(
        [torch.full((3,), float(number)) for number in range(8)],  # type: ignore[arg-type]
        batch_size=2,
        num_workers=1,
        persistent_workers=True,
        multiprocessing_context="fork",
    )
    epoch = iter(batches)
    next(epoch)

    result = preflight(
        nn.Linear(3, 1), batches, loss=lambda m, x: m(x).sum(), max_batches=2, verbose=False
    )

    assert len(result.loss) == 2
    assert [batch[0, 0].item() for batch in epoch] == [2.0, 4.0, 6.0]
    assert iter(batches) is epoch  # the same workers for the next
