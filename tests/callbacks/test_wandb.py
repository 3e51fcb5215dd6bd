"""A fit with a guard and Lightning's own logger, read back from W&B's files."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_gradguard import GradGuard
from lightning_gradguard.diagnose import Severity
from tests.engines.test_ddp import both_ranks
from tests.models import Regression, loader, make_batches, quiet_trainer
from tests.record.wandb_log import WandbLog, finished, offline, read_log

pytestmark = pytest.mark.slow

STEPS = 30
POISONED = (3, 7, 8, 25)
LOGGED = [9, 19, 29]


@pytest.fixture
def wandb(tmp_path: Path) -> Iterator[Any]:
    with offline(tmp_path) as module:
        yield module


def fit(root: Path, poisoned: tuple[int, ...] = POISONED, **options: Any) -> GradGuard:
    """With nothing set up but the logger."""
    from lightning.pytorch.loggers import WandbLogger

    guard = GradGuard()
    logger = WandbLogger(offline=True, save_dir=root)
    trainer = quiet_trainer(root, guard, logger=logger, log_every_n_steps=10, **options)
    trainer.fit(Regression(), loader(make_batches(STEPS, poisoned=poisoned)))
    assert not guard.broken
    return guard


def assert_all_is_there(log: WandbLog) -> None:
    settings = log.config["gradguard"]
    assert settings["GradGuard"]["cap"]["on_evidence"] is True
    assert {"torch", "lightning"} <= settings["versions"].keys()
    for pattern in ("grad_norm/*", "update_ratio/*", "gradguard/*"):
        assert log.metrics[pattern].step_metric == "trainer/global_step"
    for key in ("grad_norm/total", "grad_norm/body.0", "gradguard/clip_threshold"):
        assert [step for step, _ in log.column(key)][: len(LOGGED)] == LOGGED
    assert log.column("update_ratio/head")
    assert log.column("grad_maps/grad_norm")
    assert log.column("grad_histograms/layers")
    assert log.summary["gradguard/skipped_steps"]["max"] == len(POISONED)
    assert log.column("gradguard/report")
    assert "report" in {artifact.type for artifact in log.artifacts}


def test_a_guard_by_itself_shows_all_it_knows(tmp_path: Path, wandb: Any) -> None:
    guard = fit(tmp_path)
    log = read_log(finished(wandb, tmp_path))
    assert_all_is_there(log)
    assert len(log.column("gradguard/findings_table")) >= 1
    found = {finding.pathology.value for finding in guard.findings}
    for name in found:
        levels = [level for _, level in log.column(f"gradguard/found/{name}")]
        assert max(levels) >= Severity.WARNING
    # Each action jumps at its own step, whenever the Trainer logs.
    skips = log.column("gradguard/actions/skip")
    jumps = [step for (step, low), (_, high) in pairwise(skips) if high > low]
    assert jumps == list(POISONED)
    assert skips[-1][1] == len(POISONED)


def test_each_run_of_a_process_has_its_own(tmp_path: Path, wandb: Any) -> None:
    for number, poisoned in enumerate([(3,), (4, 6)]):
        fit(tmp_path / str(number), poisoned)
        wandb.finish()
    wandb.teardown()
    counts = []
    for number in range(2):
        (path,) = (tmp_path / str(number)).glob("wandb/offline-run-*/*.wandb")
        log = read_log(path)
        assert "gradguard" in log.config
        counts.append(log.column("gradguard/actions/skip")[-1][1])
    assert counts == [1, 2]


def on_this_rank(root: str) -> dict[str, Any]:
    with offline(Path(root)):
        guard = fit(Path(root), devices=2, strategy="ddp", use_distributed_sampler=False)
    return {"skips": torch.tensor(guard.counts["skipped_steps"])}


def test_of_several_ranks_one_has_a_run(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    ((first, second),) = both_ranks(on_this_rank, tmp_path, ())
    assert first["skips"] == second["skips"] == len(POISONED)
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert_all_is_there(read_log(path))
