"""See and understand, without changing a bit of training."""

from __future__ import annotations

from typing import Literal

from lightning_gradguard.callbacks.base import EngineCallback
from lightning_gradguard.diagnose import Thresholds
from lightning_gradguard.incidents import Incidents
from lightning_gradguard.sampling import EXACT_EVERY_N_STEPS


class GradientMonitor(EngineCallback):
    """Measures gradient norms, logs them and finds what is wrong; never changes training.

    A run with it is bit-identical to one without. It logs ``grad_norm/total`` and
    ``grad_norm/<layer>`` every ``Trainer.log_every_n_steps`` steps, and the mean, standard
    deviation and maximum of the log-norm over each epoch.

    Args:
        layer_depth: Components of the module path that make a layer in the metric keys; default
            ``None``, the whole path.
        events: Whether to append findings to ``gradguard/events.jsonl`` in the run's log
            directory. Default ``True``.
        timesteps: Modules whose gradient is measured through time. Default ``"auto"``: recurrent
            modules and attention encoders, wherever they are. Also names or patterns, as in
            ``["encoder.*"]``; names with the time axis of the module's output, for modules of other
            types, as in ``{"tcn": 2}``; or ``None`` for none.
        exact_every_n_steps: Steps between exact measurements of recurrent modules. Default 300:
            each costs 0.6 to 1.6 training steps. In between, every 50 steps, the gradient of their
            input is measured, which costs less; both together take at most 1% of the run.
        preflight: Whether to measure the first batch before the first step and print a table, which
            is kept as ``preflight_result``, see :func:`lightning_gradguard.preflight`. Default
            ``False``.
        thresholds: What counts as a finding.
        incidents: What is kept of steps that go wrong, in ``gradguard/incidents`` in the run's log
            directory, to be looked at again with ``gradguard replay``. Default ``True``, as
            ``Incidents()``; ``False`` for nothing.
        history: Whether to keep the numbers of the run in ``gradguard/history`` in its log
            directory, at most 50 MB of them, for reports, ``gradguard watch`` and pandas. Default
            ``True``; it needs the events, and of a Trainer without a logger a
            ``default_root_dir``.
        report: Whether to write ``gradguard/report.html`` at the end of the fit, from the history.
            Default ``True``.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_gradguard import GradientMonitor
        >>> monitor = GradientMonitor(layer_depth=2)
        >>> trainer = Trainer(callbacks=[monitor], logger=False, enable_checkpointing=False)
    """

    precedence = 1

    def __init__(
        self,
        layer_depth: int | None = None,
        events: bool = True,
        timesteps: Literal["auto"] | list[str] | dict[str, int] | None = "auto",
        exact_every_n_steps: int = EXACT_EVERY_N_STEPS,
        preflight: bool = False,
        thresholds: Thresholds = Thresholds(),
        incidents: Incidents | bool = True,
        history: bool = True,
        report: bool = True,
    ) -> None:
        super().__init__(
            layer_depth,
            events=events,
            timesteps=timesteps,
            exact_every_n_steps=exact_every_n_steps,
            preflight=preflight,
            thresholds=thresholds,
            incidents=incidents,
            history=history,
            report=report,
        )
