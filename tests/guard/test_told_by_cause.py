"""Who listens hears of a cause before what it brings about, though both come with one step."""

from __future__ import annotations

from typing import Any

from lightning_gradguard.diagnose import Diagnosis, Finding, Observation, Pathology, Severity
from lightning_gradguard.pipeline import Outcome, Pipeline
from lightning_gradguard.record import Alert, AlertChannel, AlertSender, GradientAlert, Recorder
from lightning_gradguard.respond.ladder import StepPlan


class Finds:
    """Finds one thing at step 3."""

    def __init__(self, pathology: Pathology, severity: Severity, where: str) -> None:
        self.found = Finding(pathology, severity, where, 3, {}, f"{pathology.value}.")

    def observe(self, observation: Observation) -> list[Finding]:
        return [self.found] if observation.step == 3 else []

    def is_open(self, where: str) -> bool:
        return True

    def reset(self) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def test_what_follows_from_something_too_mild_to_be_told_is_told_itself():
    told: list[Alert] = []
    heard: list[Any] = []
    recorder = Recorder()
    settings = GradientAlert(min_severity="critical")
    sender = AlertSender(settings, [AlertChannel("test", told.append)])
    sender.listen(recorder)
    recorder.listeners.append(heard.append)
    pipeline = Pipeline(None, None, recorder)
    effect = Finds(Pathology.DIVERGING, Severity.CRITICAL, "loss")
    cause = Finds(Pathology.UPDATE_OUT_OF_RANGE, Severity.WARNING, "rnn")
    pipeline._diagnosis = Diagnosis([effect], [cause])
    for step in range(6):
        pipeline.take(Outcome(step, StepPlan(), total_norm=1.0, loss=1.0))
    sender.close()
    assert [f.pathology for f in heard] == [Pathology.UPDATE_OUT_OF_RANGE, Pathology.DIVERGING]
    assert heard[1].follows_from == "update_out_of_range in rnn"
    assert [alert.title for alert in told] == ["GradGuard: loss diverges"]
