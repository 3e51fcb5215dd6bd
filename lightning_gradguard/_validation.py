"""One clear sentence for a bad argument: its name, its value, what is allowed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from operator import ge, gt, le, lt


def check_number(
    name: str,
    value: object,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    integer: bool = False,
) -> None:
    """Raise unless ``value`` is a number in the stated range.

    Raises:
        TypeError: If ``value`` is not a number (a ``bool`` is not), or not an integer where one
            is asked for.
        ValueError: If ``value`` is NaN or out of range.

    Example:
        >>> check_number("window", 0, at_least=1, integer=True)
        Traceback (most recent call last):
        ...
        ValueError: window must be an integer >= 1, got 0
    """
    bounds: list[tuple[float | None, str, Callable[[float, float], bool]]] = [
        (at_least, ">=", ge),
        (above, ">", gt),
        (at_most, "<=", le),
        (below, "<", lt),
    ]
    limits = " and ".join(f"{sign} {bound:g}" for bound, sign, _ in bounds if bound is not None)
    allowed = f"{'an integer' if integer else 'a number'} {limits}".rstrip()
    message = f"{name} must be {allowed}, got {value!r}"
    if isinstance(value, bool) or not isinstance(value, int if integer else Real):
        raise TypeError(message)
    number = float(value)
    if math.isnan(number):
        raise ValueError(message)
    if not all(holds(number, bound) for bound, _, holds in bounds if bound is not None):
        raise ValueError(message)


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``allowed``.

    Example:
        >>> check_choice("mode", "guard", ("protect", "observe"))
        Traceback (most recent call last):
        ...
        ValueError: mode must be one of 'protect', 'observe', got 'guard'
    """
    if value not in allowed:
        options = ", ".join(repr(option) for option in allowed)
        raise ValueError(f"{name} must be one of {options}, got {value!r}")


def check_type(name: str, value: object, expected: type | tuple[type, ...], allowed: str) -> None:
    """Raise ``TypeError`` unless ``value`` is of type ``expected``; ``allowed`` names it."""
    if not isinstance(value, expected):
        raise TypeError(f"{name} must be {allowed}, got {value!r}")


def check_observes(
    mode: str, responses: Mapping[str, object], defaults: Mapping[str, object]
) -> None:
    """Raise ``ValueError`` if a response is asked for in a mode that turns all of them off.

    Args:
        mode: The mode.
        responses: What was given for each response; ``None`` and the default ask for nothing.
        defaults: What each is if it is left out.

    Example:
        >>> check_observes("observe", {"cap": 3}, {"cap": 2})
        Traceback (most recent call last):
        ...
        ValueError: cap must be left out with mode='observe', which turns every response off, got 3
    """
    for name, response in responses.items():
        if mode == "observe" and response is not None and response != defaults[name]:
            raise ValueError(
                f"{name} must be left out with mode='observe', which turns every response off, "
                f"got {response!r}"
            )
