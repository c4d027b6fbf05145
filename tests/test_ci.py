"""The workflow on GitHub: well-formed, and of the versions that the project says it is tested with."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PINNED = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def workflow() -> dict:
    return yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))


def test_every_python_that_the_package_names_runs_what_a_contributor_runs(workflow):
    job = workflow["jobs"]["python"]
    pythons = job["strategy"]["matrix"]["python"]
    named = [entry.rpartition(" ")[2] for entry in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", entry)]
    assert pythons == named
    assert pythons[0] == PROJECT["requires-python"].removeprefix(">=")
    assert job["steps"][-1]["run"] == ".ci/run"


def test_torch_is_the_pinned_one_for_a_cpu(workflow):
    assert workflow["env"]["TORCH"] == (
        f"pip install torch=={PINNED['torch']} --index-url https://download.pytorch.org/whl/cpu"
    )
    for job in workflow["jobs"].values():
        runs = [step.get("run", "") for step in job["steps"]]
        assert sum("$TORCH" in run for run in runs) == 1
        assert next(i for i, run in enumerate(runs) if run) == next(i for i, run in enumerate(runs) if "$TORCH" in run)


def test_transformers_is_the_oldest_the_pinned_and_the_newest_which_alone_may_fail(workflow):
    job = workflow["jobs"]["transformers"]
    rows = job["strategy"]["matrix"]["include"]
    oldest = next(text for text in PROJECT["dependencies"] if text.startswith("transformers>="))
    versions = [row["version"].removeprefix("==") for row in rows]
    assert versions == [oldest.removeprefix("transformers>=") + ".0", PINNED["transformers"], ""]
    assert [row["may-fail"] for row in rows] == [False, False, True]
    assert all(row["may-fail"] == ("may fail" in row["name"]) for row in rows)
    assert job["continue-on-error"] == "${{ matrix.may-fail }}"
