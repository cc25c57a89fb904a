"""What a newcomer relies on: files that exist, links that resolve, commands that are real."""

import json
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
TRACKED = subprocess.run(
    ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
    cwd=ROOT, capture_output=True, text=True, check=True,
).stdout.split("\n")  # fmt: skip
PYTHON = [ROOT / name for name in TRACKED if name.endswith(".py") and (ROOT / name).is_file()]
MARKDOWN = [ROOT / name for name in TRACKED if name.endswith(".md") and (ROOT / name).is_file()]


@pytest.mark.parametrize(
    "name",
    ["pyproject.toml", "README.md", "CITATION.cff", "LICENSE", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile",
     "constraints.txt", ".ci/run", ".pre-commit-config.yaml"],
)  # fmt: skip
def test_expected_file_exists(name):
    assert (ROOT / name).is_file()


def test_citation_has_what_the_schema_requires():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["authors"]


def test_version_is_stated_once():
    import spatialvlm

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" in project["dynamic"]
    assert f"## {spatialvlm.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == spatialvlm.__version__


def test_constraints_hold_names_and_versions_only():
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!+_-]+", line), line


def test_every_runtime_dependency_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {
        re.sub(r"[-_.]+", "-", line.split("==")[0]).lower()
        for line in (ROOT / "constraints.txt").read_text().split()
    }
    for requirement in project["dependencies"]:
        name = re.match(r"[A-Za-z0-9._-]+", requirement).group()
        assert re.sub(r"[-_.]+", "-", name).lower() in pinned, requirement


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda p: str(p.relative_to(ROOT)))
def test_relative_links_resolve(path):
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.S)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not re.match(r"[a-z]+:", target):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_commands_in_the_readme_name_real_files():
    text = (ROOT / "README.md").read_text()
    for name in re.findall(
        r"\b((?:recipes|tools|benchmarks|configs)/[\w/.]+\.(?:py|yaml|sh))", text
    ):
        assert (ROOT / name).is_file(), name
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    for target in re.findall(r"`make ([a-z-]+)`", text):
        assert target in targets, target


def test_no_pickle_and_no_unsafe_load():
    """`torch.load` and unpickling run code from files; the three readers that need them restrict it."""
    allowed = {
        "spatialvlm/models/geometry/loader.py",
        "spatialvlm/scenes/importers/unpickle.py",
        "spatialvlm/training/deepspeed_files.py",
    }
    for path in PYTHON:
        name = str(path.relative_to(ROOT))
        if name.startswith(("tests/", "benchmarks/")) or name in allowed:
            continue
        text = path.read_text()
        for pattern in (
            r"torch\.load\(",
            r"pickle\.loads?\(",
            r"yaml\.load\(",
            r"\beval\((?!\))",
            r"allow_pickle=True",
        ):
            for match in re.finditer(pattern, text):
                line = text[: match.start()].count("\n") + 1
                source = text.splitlines()[line - 1].strip()
                assert ".eval(" in source or source.startswith("#"), f"{name}:{line}: {source}"


def test_no_machine_path_is_committed():
    for name in TRACKED:
        path = ROOT / name
        if (
            not name
            or not path.is_file()
            or path.suffix in {".png", ".jpg", ".safetensors", ".parquet", ".mp4"}
        ):
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        for needle in ("/work" + "/main", "/root" + "/", "/opt" + "/pypi", "pypi.org" + "/simple"):
            assert needle not in text, f"{name} contains {needle}"


def test_json_files_parse():
    for name in TRACKED:
        if name.endswith(".json") and (ROOT / name).is_file() and not name.startswith("tests/data"):
            json.loads((ROOT / name).read_text())


def test_shell_files_are_valid():
    scripts = [n for n in TRACKED if n.endswith((".sh", ".sbatch")) or n == ".ci/run"]
    assert scripts
    for name in scripts:
        subprocess.run(["bash", "-n", str(ROOT / name)], check=True)
