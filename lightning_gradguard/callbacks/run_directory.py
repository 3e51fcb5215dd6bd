"""Where a run keeps its files."""

from __future__ import annotations

import logging
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger

logger = logging.getLogger("lightning_gradguard")


def run_directory(trainer: Trainer) -> Path | None:
    """The directory of this run alone, the same on all ranks, each of which has to ask.

    That of the first logger: its own where it has one (TensorBoard, CSV), otherwise by the rule of
    Lightning's checkpoints, ``save_dir/name/version``, as a directory that W&B shares among all
    runs would mix them up. Without a logger it is ``default_root_dir``. ``None`` where that is no
    local directory.
    """
    named = _of_first_logger(trainer) if trainer.is_global_zero else None
    directory: str = trainer.strategy.broadcast(named or trainer.default_root_dir)
    return None if "://" in directory else Path(directory)


def wants_files(trainer: Trainer) -> bool:
    """Whether to write files of every run, a healthy one too.

    Who logs nothing and names no directory expects none in the working directory.
    """
    return bool(trainer.loggers) or Path(trainer.default_root_dir).resolve() != Path.cwd()


def _of_first_logger(trainer: Trainer) -> str | None:
    if not trainer.loggers:
        return None
    try:
        return _directory_of(trainer.loggers[0], trainer.default_root_dir)
    except Exception as error:  # noqa: BLE001 - the other ranks wait for an answer
        name = type(trainer.loggers[0]).__name__
        logger.warning("%s does not tell where it keeps its files: %s", name, error)
        return None


def _directory_of(first: Logger, default_root: str) -> str:
    own = getattr(first, "log_dir", None)
    if own:
        return str(own)
    version = first.version
    if isinstance(version, int):
        version = f"version_{version}"
    root = first.save_dir or default_root
    return "/".join(str(part) for part in (root, first.name, version) if part)
