"""Runs of several kinds, and what a page of HTML says."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import numpy as np

from lightning_gradguard.diagnose import Finding, Pathology, Remedy, Severity
from lightning_gradguard.record.run_history import (
    LayerMatrix,
    OptimizerHistory,
    RunHistory,
    RunInfo,
)
from tests.record.runs import made_up_run

EVIL = "<script>alert(1)</script>&\"'\u2028--loss"
_VOID = {"meta", "br", "link", "input"}


class Page(HTMLParser):
    """The elements of a page, and its text without scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[int] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open, f"not closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if re.fullmatch(r"h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag not in _VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"{tag} closes something else"

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self._open):
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))

    @property
    def ids(self) -> list[str]:
        return [value for _, attrs in self.elements if (value := attrs.get("id")) is not None]


def figures_of(html: str) -> dict[str, Any]:
    """What the page gives plotly to draw."""
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', html)
    figures: dict[str, Any] = json.loads(found.group(1)) if found else {}
    return figures


def numbers_of(values: dict[str, str]) -> np.ndarray[Any, Any]:
    """A typed array of plotly's as numbers."""
    return np.frombuffer(base64.b64decode(values["bdata"]), dtype=values["dtype"])


def healthy() -> RunHistory:
    run = made_up_run(600)
    counts = {"steps": 600, "skipped_steps": 0, "clipped_steps": 0, "capped_steps": 0}
    return with_part(run, findings=(), actions=(), counts=counts)


def with_part(run: RunHistory, **changes: Any) -> RunHistory:
    return replace(run, optimizers=(replace(run.optimizers[0], **changes),))


def with_columns(run: RunHistory, **columns: Any) -> RunHistory:
    return with_part(run, steps={**run.optimizers[0].steps, **columns})


def empty() -> RunHistory:
    return RunHistory(RunInfo(name="empty"), (OptimizerHistory(),))


def failed() -> RunHistory:
    run = made_up_run(50)
    return replace(run, info=replace(run.info, status="failed", error="ValueError: no such file"))


def two_optimizers() -> RunHistory:
    first, second = made_up_run(100, label="generator"), made_up_run(80, label="critic", seed=1)
    facts = (*first.info.optimizers, *second.info.optimizers)
    info = replace(first.info, optimizers=facts)
    return RunHistory(info, (*first.optimizers, *second.optimizers))


def nan_losses() -> RunHistory:
    run = made_up_run(200)
    loss, norm = (run.optimizers[0].steps[name].copy() for name in ("loss", "total_norm"))
    loss[150:] = np.nan
    norm[150:] = np.nan
    norm[120] = np.inf
    return with_columns(run, loss=loss, total_norm=norm)


def one_layer() -> RunHistory:
    return made_up_run(30, 1)


def without_time() -> RunHistory:
    return with_part(made_up_run(40), times=())


def evil() -> RunHistory:
    """A run in which everything that has a name has a bad one."""
    run = made_up_run(60, 2)
    part = run.optimizers[0]
    finding = Finding(
        Pathology.EXPLODING,
        Severity.CRITICAL,
        EVIL,
        7,
        {EVIL: 1.0},
        f"Trouble in {EVIL}.",
        (Remedy(EVIL, EVIL, EVIL),),
    )
    names = (EVIL, f"{EVIL}.b")
    changed = replace(
        part,
        label=EVIL,
        layers=LayerMatrix(names, part.layers.steps, part.layers.values),
        updates=LayerMatrix(names, part.updates.steps, part.updates.values),
        times=tuple(replace(r, module=EVIL, note=EVIL) for r in part.times),
        findings=(finding, replace(finding, where="b", follows_from=f"exploding in {EVIL}")),
        actions=(replace(part.actions[0], message=EVIL), part.actions[1]),
    )
    info = RunInfo(
        name=EVIL,
        model=EVIL,
        status="failed",
        error=EVIL,
        settings={EVIL: {EVIL: EVIL}},
        versions={EVIL: EVIL},
        optimizers=({"label": EVIL, "class": EVIL, "lr": 0.1},),
    )
    return RunHistory(info, (changed, replace(changed, label=f"{EVIL}2")))


KINDS = {
    "healthy": healthy,
    "empty": empty,
    "nothing": RunHistory,
    "failed": failed,
    "two optimizers": two_optimizers,
    "NaN losses": nan_losses,
    "one layer": one_layer,
    "no time readings": without_time,
    "bad names": evil,
}
