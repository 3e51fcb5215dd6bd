"""What holds for every task."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import pytorch_lightning
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

import lightning_gradguard
from lightning_gradguard import tasks
from lightning_gradguard.tasks import AddingProblem, CopyMemory, TemporalOrder
from tests.tasks.small import SIZES, TASKS, digest

CHECKOUT = Path(lightning_gradguard.__file__).parents[1]

DIGESTS = """
import sys
from pathlib import Path
from tests.tasks.small import TASKS, digest

if __name__ == "__main__":
    for name, make in TASKS.items():
        print(digest(make(Path(sys.argv[1]))))
"""

WITHOUT_LIGHTNING = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "lightning":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
from lightning_gradguard.tasks import AddingProblem
print(*(base.__module__ for base in AddingProblem.__mro__))
"""


def run_python(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=CHECKOUT,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


class Model(LightningModule):
    """A GRU that answers as the task asks for."""

    def __init__(self, task):
        super().__init__()
        self.task = task
        self.rnn = nn.GRU(task.input_size, 4, batch_first=True)
        self.head = nn.Linear(4, task.output_size)
        self.losses, self.scores = [], []

    def forward(self, inputs):
        outputs, _ = self.rnn(inputs)
        return self.head(outputs if self.task.kind == "per step" else outputs[:, -1])

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        loss = self.task.loss(self(inputs), targets)
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch, batch_idx):
        self.scores.append(float(self.task.score(self(batch[0]), batch[1])))

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


def trainer_for(folder, kind=Trainer):
    return kind(
        default_root_dir=folder,
        accelerator="cpu",
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


@pytest.fixture(params=TASKS)
def make(request, tmp_path):
    return lambda **more: TASKS[request.param](tmp_path, **more)


def test_what_a_model_needs_to_know_is_known_before_data_are_made(make):
    task = make()
    known = {"length", "input_size", "output_size", "kind", "baseline"}
    said = {name: getattr(task, name) for name in known}
    assert not task._made

    inputs, targets = next(iter(task.train_dataloader()))

    assert inputs.shape == (4, said["length"], said["input_size"])
    assert inputs.dtype == torch.float32
    assert targets.shape == ((4, said["length"]) if said["kind"] == "per step" else (4,))
    assert targets.dtype == (torch.float32 if said["kind"] == "regression" else torch.int64)
    assert task.classes == (0 if said["kind"] == "regression" else said["output_size"])
    assert int(targets.max()) < said["output_size"] or said["kind"] == "regression"
    assert said["baseline"] > 0


def test_splits_have_the_sizes_asked_for_and_share_no_data(make):
    task = make()
    task.setup()

    splits = {name: task.split(name) for name in ("train", "val", "test")}

    assert {name: len(split) for name, split in splits.items()} == {
        "train": 24,
        "val": 8,
        "test": 8,
    }
    firsts = [split.batch()[0][0] for split in splits.values()]
    assert not torch.equal(firsts[0], firsts[1])
    assert not torch.equal(firsts[1], firsts[2])


def test_an_index_alone_decides_its_example(make):
    split = make().split("train")
    inputs, targets = split.batch()

    for index in (5, 0, -1):
        assert torch.equal(split[index][0], inputs[index])
        assert torch.equal(split[index][1], targets[index])
    with pytest.raises(IndexError):
        split[24]
    (batch,) = DataLoader(split, batch_size=24)
    assert torch.equal(batch[0], inputs)
    assert torch.equal(batch[1], targets)


def test_training_comes_in_another_order_every_epoch_but_holds_the_same(make):
    task = make()
    loader = task.train_dataloader()
    inputs, _ = task.split("train").batch()

    first, second = (torch.cat([batch[0] for batch in loader]) for _ in range(2))

    if getattr(task, "stateful", False):
        assert torch.equal(first, inputs)
        assert torch.equal(first, second)
    else:
        assert not torch.equal(first, second)
        assert torch.equal(first.sum(0), inputs.sum(0)) or torch.allclose(
            first.sum(0), inputs.sum(0), atol=1e-5
        )
    val = torch.cat([batch[0] for batch in task.val_dataloader()])
    assert torch.equal(val, task.split("val").batch()[0])


def test_data_follow_from_the_seed_and_from_nothing_else(make):
    torch.manual_seed(1)
    one = digest(make())
    torch.manual_seed(2)
    state = torch.get_rng_state()

    assert digest(make()) == one
    assert torch.equal(torch.get_rng_state(), state)
    if not getattr(make(), "stateful", False):
        assert digest(make(seed=1)) != one


def test_workers_change_nothing(make):
    assert digest(make(num_workers=2)) == digest(make())


def test_an_epoch_that_was_cut_short_does_not_change_the_next_one(make):
    loaders = [make(num_workers=workers).train_dataloader() for workers in (0, 0, 2)]
    for loader in loaders[1:]:
        next(iter(loader))
    list(loaders[0])

    second = [torch.cat([inputs for inputs, _ in loader]) for loader in loaders]

    assert torch.equal(second[0], second[1])
    assert torch.equal(second[0], second[2])


def test_a_resumed_run_goes_on_in_the_order_of_its_epoch(make):
    through, resumed = make().train_dataloader(), make().train_dataloader()
    epochs = [torch.cat([inputs for inputs, _ in through]) for _ in range(3)]
    if hasattr(resumed.sampler, "set_epoch"):
        resumed.sampler.set_epoch(2)

    assert torch.equal(torch.cat([inputs for inputs, _ in resumed]), epochs[2])


@pytest.mark.slow
def test_another_process_gets_the_same(tmp_path):
    here = [digest(make(tmp_path)) for make in TASKS.values()]

    assert run_python(DIGESTS, str(tmp_path)).split() == here


def test_a_trainer_fits_validates_and_tests(make, tmp_path):
    task = make()
    model, trainer = Model(task), trainer_for(tmp_path)

    trainer.fit(model, datamodule=task)
    trainer.test(model, datamodule=task, verbose=False)

    assert len(model.losses) == 2
    assert all(0 < loss < 10 for loss in model.losses)
    assert len(model.scores) >= 4
    assert all(score <= 1 for score in model.scores)


def test_a_trainer_of_the_other_namespace_takes_the_loaders(tmp_path):
    task = AddingProblem(12, **SIZES)

    class Other(pytorch_lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Model(task)

        def training_step(self, batch, batch_idx):
            return self.net.training_step(batch, batch_idx)

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters())

    model = Other()
    trainer_for(tmp_path, pytorch_lightning.Trainer).fit(model, task.train_dataloader())

    assert len(model.net.losses) == 2


@pytest.mark.slow
def test_where_only_pytorch_lightning_is_installed_it_is_the_base():
    bases = run_python(WITHOUT_LIGHTNING).split()

    assert "pytorch_lightning.core.datamodule" in bases
    assert not any(base.startswith("lightning.") for base in bases)


def test_stages_make_what_they_need():
    task = AddingProblem(12, **SIZES)

    task.setup("validate")
    assert set(task._made) == {"val"}
    task.setup("fit")
    assert set(task._made) == {"val", "train"}
    task.setup("test")
    assert set(task._made) == {"val", "train", "test"}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"batch_size": 0}, "batch_size must be an integer >= 1, got 0"),
        ({"train_size": 0}, "train_size must be an integer >= 1, got 0"),
        ({"val_size": -1}, "val_size must be an integer >= 1, got -1"),
        ({"test_size": 0}, "test_size must be an integer >= 1, got 0"),
        ({"seed": -1}, "seed must be an integer >= 0 and <= 4.29497e"),
        ({"num_workers": -1}, "num_workers must be an integer >= 0, got -1"),
    ],
)
def test_bad_common_arguments_say_what_is_allowed(make, more, message):
    with pytest.raises(ValueError, match="must") as raised:
        make(**more)

    assert str(raised.value).startswith(message)


def test_arguments_of_a_wrong_type_say_so(make):
    with pytest.raises(TypeError, match=r"batch_size must be an integer >= 1, got 2\.5"):
        make(batch_size=2.5)


def test_an_unknown_split_says_which_there_are():
    with pytest.raises(ValueError, match="name must be one of 'train', 'val', 'test', got 'dev'"):
        AddingProblem().split("dev")


def test_loss_of_a_regression_takes_outputs_with_or_without_their_last_axis():
    task, targets = AddingProblem(12), torch.tensor([1.0, 0.5])

    assert float(task.loss(torch.tensor([1.0, 1.0]), targets)) == 0.125
    assert float(task.loss(torch.tensor([[1.0], [1.0]]), targets)) == 0.125
    assert float(task.score(targets, targets)) == 1.0
    assert float(task.score(torch.tensor([1.0, 1.0]), targets)) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("task", "outputs", "targets"),
    [
        (AddingProblem(12), (3,), (2,)),
        (AddingProblem(12), (2, 2), (2,)),
        (TemporalOrder(12), (2, 12, 4), (2,)),
        (TemporalOrder(12), (2, 5), (2,)),
        (CopyMemory(5), (2, 9), (2, 25)),
    ],
)
def test_outputs_of_another_shape_are_refused_and_not_broadcast(task, outputs, targets):
    with pytest.raises(ValueError, match="outputs must have the shape"):
        task.loss(torch.zeros(outputs), torch.zeros(targets).long())


def test_an_output_that_is_not_finite_is_a_wrong_answer():
    task = TemporalOrder(12)
    outputs = torch.full((2, 4), float("nan"))
    outputs[1] = torch.tensor([1.0, 0.0, 0.0, 0.0])

    assert float(task.score(outputs, torch.tensor([0, 0]))) == 0.5


def test_every_public_name_is_there():
    for name in tasks.__all__:
        assert getattr(tasks, name).__doc__
