"""Words and ends between real processes, without JAX's own service."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from processes import environment

from elm_jax.errors import LOST_PROCESS

MEMBER = """
import json, os, signal, socket, sys, time
from elm_jax.runtime.lifeline import Lifeline
index, count, what, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
line, path = Lifeline(index, count), f"{folder}/told"
if index == 0:
    told = line.serve()
    open(path + ".tmp", "w").write(json.dumps(told))
    os.rename(path + ".tmp", path)
    line.wait_for_all()
else:
    while not os.path.exists(path):
        time.sleep(0.01)
    told = json.load(open(path))
    if what == "stranger" and index == 1:  # knows the port, but not the word
        stranger = socket.create_connection(("127.0.0.1", told["port"]))
        stranger.sendall(b'{"word": "x", "index": 2}\\n')
        assert stranger.recv(100) == b""
    line.join("127.0.0.1", told)
if index == 0:
    line.tell({"a": [1, "b"]})
else:
    assert line.told() == {"a": [1, "b"]}
line.barrier()
open(f"{folder}/here{index}", "w").close()
if what.startswith("die") and index == int(what[3:]):
    os.kill(os.getpid(), signal.SIGKILL)
if what.startswith("fail") and index == int(what[4:]):
    line.fail(2, "this is wrong")
if what.startswith("die") or what.startswith("fail"):
    time.sleep(60)
line.barrier()
line.leave()
print("done")
"""


def members(what, folder, count=3):
    """Exit statuses, standard errors and seconds."""
    processes = [subprocess.Popen([sys.executable, "-c", MEMBER, str(number), str(count), what, str(folder)],
                                  text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                  env=environment(1)) for number in range(count)]
    # One that dies may end another before that one could say that it was here.
    while not all((folder / f"here{number}").exists() or process.poll() is not None
                  for number, process in enumerate(processes)):
        assert all(process.poll() in (None, 0, -9, 75, 2) for process in processes)
        time.sleep(0.02)
    start = time.monotonic()
    said = [process.communicate(timeout=60)[1] for process in processes]
    return [process.returncode for process in processes], said, time.monotonic() - start


def test_words_reach_all_and_strangers_do_not(tmp_path):
    statuses, said, _ = members("stranger", tmp_path)
    assert statuses == [0, 0, 0] and said == ["", "", ""]


@pytest.mark.parametrize("dead", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_death_ends_the_others_at_once_with_one_message(dead, tmp_path):
    statuses, said, seconds = members(f"die{dead}", tmp_path)
    assert statuses[dead] == -signal.SIGKILL and seconds < 20
    assert all(status == LOST_PROCESS for number, status in enumerate(statuses) if number != dead)
    assert f"process {dead} of 3" in "".join(said) and "newest checkpoint" in "".join(said)
    if dead:  # the first says it for all
        assert [text.count("A process of this run was lost") for text in said] == [1, 0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [0, 1])
def test_an_error_ends_all_with_its_status_and_is_said_by_the_first(wrong, tmp_path):
    statuses, said, seconds = members(f"fail{wrong}", tmp_path)
    assert statuses == [2, 2, 2] and seconds < 20
    assert said[0].startswith("this is wrong") and said[1:] == ["", ""]
    assert (f"process 1 of 3 (host {os.uname().nodename}" in said[0]) == (wrong == 1)
    assert json.loads((tmp_path / "told").read_text())["word"] not in "".join(said)


ALONE = """
from elm_jax.runtime import hosts
hosts.START_SECONDS = 1
hosts.start("127.0.0.1:9", 2, 1)
"""


def test_a_process_that_waits_for_others_in_vain_says_so():
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, timeout=120,
                          env=environment(1))
    assert done.returncode == LOST_PROCESS and "did not find each other" in done.stderr
    assert "127.0.0.1:9" in done.stderr and "process 1 of 2" in done.stderr
