"""The ranges of pyproject.toml hold what `make`, the container and docs/install.md name."""

import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from system.files import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RANGES = {one.name: one.specifier for one in map(Requirement, PROJECT["dependencies"])}
PINS = dict(line.split("==") for line in (ROOT / "requirements.txt").read_text().split())
ROWS = re.findall(
    r"^\| ([\w-]+) \| (\d\S*) \| (\S+) \| (\d\S*) \|$",  # library, lowest, `make`, newest
    (ROOT / "docs" / "install.md").read_text(),
    re.MULTILINE,
)


def test_what_make_installs_is_in_range():
    assert set(PINS) <= set(RANGES)
    assert not [name for name, pin in PINS.items() if pin not in RANGES[name]]


@pytest.mark.parametrize("name, lowest, pin, newest", ROWS, ids=[row[0] for row in ROWS])
def test_a_range_ends_at_the_lowest_and_newest_versions_that_were_tried(name, lowest, pin, newest):
    allowed, (major, minor) = RANGES[name], Version(newest).release[:2]
    lower = [one.version for one in allowed if one.operator == ">="]
    assert lower == [lowest] and PINS.get(name, "-") == pin
    assert newest in allowed and f"{major}.{minor + 1}" not in allowed


def test_the_table_names_every_library():
    assert [row[0] for row in ROWS] == list(RANGES)


def test_the_container_starts_from_a_torch_in_range():
    bases = re.findall(r"pytorch/pytorch:([\d.]+)-cuda", (ROOT / "Dockerfile").read_text())
    assert len(bases) == 2 and not [base for base in bases if base not in RANGES["torch"]]
