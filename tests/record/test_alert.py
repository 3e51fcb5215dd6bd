"""Who is told of what, and in which words."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_gradguard.diagnose import Finding, Pathology, Remedy, Severity
from lightning_gradguard.diagnose.remedies import with_remedies
from lightning_gradguard.readings import ModelFacts
from lightning_gradguard.record import Alert, GradientAlert, channels_of
from lightning_gradguard.record.alert import ACTION_TITLES, FINDING_TITLES, alert_of, title_of
from lightning_gradguard.respond import Action, ActionKind


def finding(
    pathology: Pathology = Pathology.EXPLODING,
    severity: Severity = Severity.WARNING,
    where: str = "rnn",
    **more: Any,
) -> Finding:
    remedies = (Remedy("Do this.", "first()"), Remedy("Or that.", "second()"))
    return Finding(
        pathology, severity, where, 7, {"z": 9.25}, "The gradient explodes.", remedies, **more
    )


def action(kind: ActionKind) -> Action:
    return Action(kind, 12, "Something was done.", {"lr_scale": 0.5})


def name(found: Finding) -> str:
    return f"{found.pathology.value} in {found.where}"


# -- words ----------------------------------------------------------------------------------------


def test_every_pathology_and_every_action_has_a_title_of_its_own():
    assert set(FINDING_TITLES) == set(Pathology)
    assert set(ACTION_TITLES) == {kind.value for kind in ActionKind}
    titles = [*FINDING_TITLES.values(), *ACTION_TITLES.values()]
    assert len(set(titles)) == len(titles)
    assert all(t.startswith("GradGuard: ") and len(t) < 64 for t in titles), "W&B refuses others"


@pytest.mark.parametrize("pathology", list(Pathology))
def test_a_title_is_the_same_wherever_and_however_bad(pathology):
    found = finding(pathology)
    others = [finding(pathology, severity, f"layer{severity}") for severity in Severity]
    assert {alert_of(other).title for other in others} == {title_of(found)}


def test_the_title_of_the_example():
    assert title_of(finding(Pathology.VANISHING_IN_TIME)) == (
        "GradGuard: vanishing gradient through time"
    )


@pytest.mark.parametrize("pathology", list(Pathology))
def test_the_text_has_evidence_and_every_remedy_once(pathology):
    found = with_remedies(replace(finding(pathology), remedies=()), ModelFacts())
    text = alert_of(found).text
    assert text.startswith("The gradient explodes.")
    assert name(found) in text
    assert "step 7" in text
    assert "z 9.25" in text
    assert found.remedies
    for remedy in found.remedies:
        assert text.count(remedy.sentence) == 1
        assert remedy.code in text


def test_the_text_names_optimizer_and_what_was_held_back_where_there_is_any():
    alert = alert_of(finding(), "optimizer1", 3)
    assert "Optimizer: optimizer1" in alert.text
    assert "held back since the last: 3" in alert.text
    assert alert.suppressed == 3
    plain = alert_of(finding()).text
    assert "Optimizer" not in plain
    assert "held back" not in plain


@pytest.mark.parametrize("severity", list(Severity))
def test_a_finding_has_the_level_of_its_severity(severity):
    found = finding(severity=severity)
    alert = alert_of(found)
    assert (alert.level, alert.finding, alert.action) == (severity.label, found, None)


def test_a_stop_is_critical_and_says_what_was_done():
    stop = action(ActionKind.STOP)
    alert = alert_of(stop)
    assert (alert.level, alert.finding, alert.action) == ("critical", None, stop)
    assert "Something was done." in alert.text
    assert "step 12" in alert.text
    assert "lr_scale 0.5" in alert.text
    assert alert_of(action(ActionKind.SKIP)).level == "warning"


def test_print_shows_an_alert_for_people(capsys):
    print(alert_of(finding()))
    assert capsys.readouterr().out.startswith("GradGuard: exploding gradient\nThe gradient")


# -- who is told ----------------------------------------------------------------------------------


@given(st.sampled_from(list(Severity)), st.sampled_from(list(Severity)), st.booleans())
def test_what_is_severe_enough_is_told_even_if_only_this_rank_has_seen_it(least, severity, local):
    settings = GradientAlert(min_severity=least.label)
    assert settings.wants(finding(severity=severity, local=local)) == (severity >= least)


@given(st.sets(st.sampled_from(sorted(ACTION_TITLES))))
def test_the_chosen_actions_are_told(chosen):
    settings = GradientAlert(actions=tuple(chosen))
    told = {kind.value for kind in ActionKind if settings.wants(action(kind))}
    assert told == chosen & {kind.value for kind in ActionKind}


def test_of_a_cause_and_what_follows_from_it_one_is_told():
    cause = finding(Pathology.UPDATE_OUT_OF_RANGE)
    effect = finding(Pathology.DIVERGING, Severity.CRITICAL, "loss", follows_from=name(cause))
    assert not GradientAlert().wants(effect, [cause, effect])
    # where the cause is too mild to be told, nobody would hear of what it has brought about
    assert GradientAlert(min_severity="critical").wants(effect, [cause, effect])
    # a cause that is no longer in memory was told in its time
    assert not GradientAlert(min_severity="critical").wants(effect, [effect])


def test_a_chain_of_causes_is_followed_to_one_that_was_told():
    first = finding(Pathology.NON_FINITE, Severity.CRITICAL)
    second = finding(Pathology.EXPLODING, follows_from=name(first))
    third = finding(Pathology.DIVERGING, Severity.CRITICAL, "loss", follows_from=name(second))
    settings = GradientAlert(min_severity="critical")
    assert not settings.wants(third, [first, second, third])
    mild = replace(first, severity=Severity.WARNING)
    assert settings.wants(third, [mild, second, third])


def test_two_that_name_each_other_do_not_hang():
    one = finding(Pathology.EXPLODING, follows_from="diverging in loss")
    other = finding(Pathology.DIVERGING, Severity.CRITICAL, "loss", follows_from=name(one))
    assert GradientAlert(min_severity="critical").wants(other, [one, other])


# -- settings -------------------------------------------------------------------------------------


async def awaited(alert: Alert) -> None:
    """Nothing would await it."""


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("send", "print", TypeError),
        ("send", awaited, TypeError),
        ("min_severity", "error", ValueError),
        ("actions", "stop", TypeError),
        ("actions", ("explode",), ValueError),
        ("wandb", 1, TypeError),
        ("log", None, TypeError),
        ("every_seconds", -1.0, ValueError),
        ("every_seconds", float("nan"), ValueError),
        ("max_alerts", 0, ValueError),
        ("max_alerts", 1.5, TypeError),
    ],
)
def test_a_bad_setting_is_named(argument, value, error):
    with pytest.raises(error, match=argument):
        GradientAlert(**{argument: value})


# -- channels -------------------------------------------------------------------------------------


class Run:
    """What W&B's run looks like from here."""

    def __init__(self) -> None:
        self.alerts: list[dict[str, Any]] = []

    def alert(self, title: str, text: str, level: str, wait_duration: float) -> None:
        self.alerts.append({"level": level, "wait_duration": wait_duration, "title": title})


@pytest.mark.parametrize(
    ("every_seconds", "wait"), [(300.0, 150.0), (0.0, 0.001), (float("inf"), 86400.0)]
)
def test_wandb_hears_levels_and_is_left_a_wait_that_never_drops_ours(every_seconds, wait):
    run = Run()
    (channel,) = channels_of(GradientAlert(every_seconds=every_seconds), [run])
    for severity in Severity:
        channel.deliver(alert_of(finding(severity=severity)))
    assert [alert["level"] for alert in run.alerts] == ["INFO", "WARN", "ERROR"]
    assert {alert["wait_duration"] for alert in run.alerts} == {wait}


def test_the_users_own_channel_is_last():
    settings = GradientAlert(send=print, log=True)
    names = [channel.name for channel in channels_of(settings, [Run()])]
    assert names == ["W&B", "Python's logging", "print"]
    assert channels_of(GradientAlert(wandb=False), [Run()]) == []


def test_the_log_channel_writes_a_warning_to_a_logger_of_its_own(caplog):
    (channel,) = channels_of(GradientAlert(log=True))
    channel.deliver(alert_of(finding(severity=Severity.CRITICAL)))
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("lightning_gradguard.alerts", logging.WARNING)
    assert "GradGuard: exploding gradient" in record.getMessage()
