"""What others see of the package: its page on an index, how to cite it, and that its types count."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
BLOB = PROJECT["urls"]["Homepage"] + "/blob/main/"


def test_links_of_the_readme_lead_somewhere_on_an_index_page_too():
    links = re.findall(r"\]\(([^)#\s]+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert links
    for link in links:
        assert link.startswith("https://"), f"{link}: an index page has no files beside it"
        if link.startswith(BLOB):
            assert (ROOT / link.removeprefix(BLOB)).exists(), link
    assert sum(link.startswith(BLOB) for link in links) >= 3


def test_the_paper_is_cited_alike_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    (paper,) = citation["references"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for fact in (paper["doi"], f"{paper['start']}--{paper['end']}", *(one["family-names"] for one in paper["authors"])):
        assert str(fact) in readme
    assert citation["license"] == PROJECT["license"]


def test_types_count_for_those_who_use_the_package():
    assert (ROOT / "genpoe_plugin" / "py.typed").is_file()
    assert "Typing :: Typed" in PROJECT["classifiers"]


def test_workflows_are_yaml_and_run_what_continuous_integration_runs():
    workflows = {path.name: yaml.safe_load(path.read_text()) for path in (ROOT / ".github" / "workflows").iterdir()}
    steps = workflows["test.yml"]["jobs"]["suite"]["steps"]
    assert {"run": ".ci/run"} in steps and (ROOT / ".ci" / "run").is_file()
    assert workflows["release.yml"]["jobs"]["publish"]["permissions"] == {"id-token": "write"}


def test_the_lowest_versions_that_are_tested_are_those_that_are_claimed():
    lines = (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    for claim in map(Requirement, PROJECT["dependencies"]):
        (lowest,) = (bound.version for bound in claim.specifier if bound.operator == ">=")
        if claim.name != "torch":  # which the index has with CUDA alone, at that version
            assert Version(pins[canonicalize_name(claim.name)]) == Version(lowest), claim
