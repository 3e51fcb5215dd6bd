from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest

from lightning_gradguard.diagnose import Finding, Pathology, Remedy, Severity, Thresholds

FINDING = Finding(
    Pathology.EXPLODING,
    Severity.WARNING,
    "encoder.rnn",
    12,
    {"z": 9.5},
    "The gradient norm of `encoder.rnn` is 9 times its usual level.",
    (Remedy("Lower the learning rate.", "lr = 0.1 * lr"),),
    timestep=3,
)


def test_a_finding_survives_json() -> None:
    assert Finding.from_dict(json.loads(json.dumps(FINDING.to_dict()))) == FINDING


def test_a_finding_is_written_in_plain_values() -> None:
    data = FINDING.to_dict()
    assert data["pathology"] == "exploding"
    assert type(data["pathology"]) is str
    assert data["severity"] == "warning"
    assert data["timestep"] == 3


@pytest.mark.parametrize("key", ["pathology", "severity"])
def test_unknown_words_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match="nonsense"):
        Finding.from_dict({**FINDING.to_dict(), key: "nonsense"})


def test_severities_are_ordered_and_labelled() -> None:
    assert Severity.INFO < Severity.WARNING < Severity.CRITICAL
    assert [s.label for s in Severity] == ["info", "warning", "critical"]
    assert [Severity.from_label(s.label) for s in Severity] == list(Severity)


def test_pathologies_are_their_values() -> None:
    assert [p.value for p in Pathology] == [
        "non_finite",
        "underflow",
        "dead_units",
        "saturated",
        "layer_not_training",
        "vanishing_in_time",
        "vanishing_in_depth",
        "update_out_of_range",
        "exploding",
        "diverging",
        "loss_spike",
        "oscillating",
        "stagnating",
    ]
    assert Pathology("diverging") is Pathology.DIVERGING


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(Thresholds)])
def test_every_threshold_is_checked_and_named(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Thresholds(**{name: -1})
    with pytest.raises(TypeError, match=name):
        Thresholds(**{name: "many"})  # type: ignore[arg-type]
    if isinstance(getattr(Thresholds(), name), float):
        with pytest.raises(ValueError, match=name):
            Thresholds(**{name: math.inf})  # type: ignore[arg-type]
    else:
        with pytest.raises(TypeError, match=name):
            Thresholds(**{name: 8.5})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup": 200}, r"warmup must be at most window \(128\), got 200"),
        ({"accept_after": 129}, r"accept_after must be at most window \(128\), got 129"),
        ({"recent": 17}, r"recent must be at most block \(16\), got 17"),
        ({"least_moves": 33}, r"least_moves must be at most moves \(32\), got 33"),
        ({"dead_share": 0.97}, r"dead_share must be at most all_dead_share \(0\.95\), got 0\.97"),
    ],
)
def test_thresholds_that_contradict_each_other(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Thresholds(**options)


def test_thresholds_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Thresholds().window = 1  # type: ignore[misc]
