"""The package's surface and its metadata."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from importlib import metadata, resources
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import lightning_gradguard

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CHECKOUT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))
PUBLIC = sorted(set(lightning_gradguard.__all__) - {"__version__"})


def requirements(lines: list[str]) -> dict[str, Requirement]:
    return {canonicalize_name(each.name): each for each in map(Requirement, lines)}


def pins() -> dict[str, Requirement]:
    text = (CHECKOUT / "constraints.txt").read_text(encoding="utf-8")
    return requirements([line for line in text.splitlines() if line and not line.startswith("#")])


CORE = requirements(PYPROJECT["project"]["dependencies"])
EXTRAS = {
    name: requirements(lines)
    for name, lines in PYPROJECT["project"]["optional-dependencies"].items()
}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_is_the_object_of_the_room_it_is_listed_under(name):
    value = getattr(lightning_gradguard, name)

    assert inspect.isclass(value) or inspect.isfunction(value)
    assert value.__name__ == name
    assert value.__module__.startswith(lightning_gradguard._MODULE_OF[name])
    assert value.__doc__


def test_names_known_to_type_checkers_to_users_and_at_run_time_agree():
    tree = ast.parse(inspect.getsource(lightning_gradguard))
    (guarded,) = (node for node in tree.body if isinstance(node, ast.If))
    for_type_checkers = {
        alias.name: node.module
        for node in guarded.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }

    assert for_type_checkers == lightning_gradguard._MODULE_OF
    assert sorted(lightning_gradguard._MODULE_OF) == PUBLIC


def test_dir_lists_names_that_were_not_imported_yet():
    assert set(lightning_gradguard.__all__) <= set(dir(lightning_gradguard))


def test_unknown_name_is_an_attribute_error_that_says_which():
    with pytest.raises(AttributeError, match="no attribute 'GradGaurd'"):
        _ = lightning_gradguard.GradGaurd


def test_package_ships_its_type_marker():
    assert (resources.files("lightning_gradguard") / "py.typed").is_file()


def test_version_is_a_release_number_and_the_one_installed():
    assert re.fullmatch(r"\d+\.\d+\.\d+", lightning_gradguard.__version__)
    try:
        installed = metadata.version("lightning-gradguard")
    except metadata.PackageNotFoundError:
        pytest.skip("the package runs from a checkout that is not installed")
    assert installed == lightning_gradguard.__version__


def test_core_needs_torch_lightning_and_torchmetrics_only():
    those_of_torch_and_torchmetrics = {"jinja2", "numpy"}
    assert set(CORE) == {"torch", "lightning", "torchmetrics"} | those_of_torch_and_torchmetrics
    assert PYPROJECT["project"]["requires-python"] == ">=3.10"


@pytest.mark.parametrize("withdrawn", ["2.6.2", "2.6.3"])
def test_withdrawn_lightning_releases_are_refused(withdrawn):
    specifier = CORE["lightning"].specifier

    assert Version(withdrawn) not in specifier
    assert Version("2.6.6") in specifier
    assert Version("2.3.3") not in specifier


def test_core_ranges_have_no_upper_bound():
    for requirement in CORE.values():
        assert {part.operator for part in requirement.specifier} <= {">=", "!="}
        assert Version("99.0") in requirement.specifier


def test_extra_all_is_every_other_extra():
    (everything,) = EXTRAS["all"].values()

    assert everything.name == PYPROJECT["project"]["name"]
    assert everything.extras == set(EXTRAS) - {"all"}


def test_every_declared_dependency_is_pinned_to_a_version_its_range_allows():
    declared = dict(CORE)
    for extra in EXTRAS.values():
        declared.update(extra)
    for group in ("test", "bench", "dev"):
        lines = [line for line in PYPROJECT["dependency-groups"][group] if isinstance(line, str)]
        declared.update(requirements(lines))
    # The package itself is the checkout, and tomli is for a Python that no pin is made on.
    for name in set(declared) - {PYPROJECT["project"]["name"], "tomli"}:
        (pin,) = pins()[name].specifier
        assert pin.operator == "=="
        assert Version(pin.version) in declared[name].specifier, name
        assert Version(pin.version).local is None, name
