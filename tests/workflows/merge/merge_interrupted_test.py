"""A merge that is killed, or meets a full disk, another process, or what another merge left behind."""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading

import merge_made as made
import mergekit_peer as peer
import numpy as np
import pytest

from elm_jax.cli.merge import plain_config
from elm_jax.errors import InputError, RunError
from elm_jax.experts.base import load_base
from elm_jax.experts.overlay import load_expert
from elm_jax.merging import stream
from elm_jax.runtime import staging, trees
from elm_jax.workflows.merge import merge_folders, merge_overlays, output_files
from elm_jax.workflows.merge.merge_folders import MergeOptions

OPTIONS = MergeOptions(quiet=True, max_shard_bytes=30_000.0)
JOURNAL = output_files.JOURNAL
KILLED = """
import os, signal, sys
from elm_jax.cli import main as cli
from elm_jax.workflows.merge import output_files

output_files._FLUSH_BYTES = 1
add = output_files._Journal.add

def add_and_die(self, name):
    add(self, name)
    self._last.result()
    if self.count == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    self.count += 1

output_files._Journal.add, output_files._Journal.count = add_and_die, 0
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A base and three experts in bfloat16, several shards each."""
    return peer.make_family(tmp_path_factory.mktemp("llama"), "llama", "bfloat16")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return made.save_models(tmp_path_factory.mktemp("models"), kinds=("elm",))["elm"]


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    where = tmp_path_factory.mktemp("experts")
    return {form: made.save_experts(where, form) for form in ("adapter", "lora")}


def config(folders, method="mean", weights=(0.7, 0.2, 0.1), base=None, dtype=None, **parameters):
    folders = [str(folder) for folder in folders]
    return plain_config(method, folders, weights, base and str(base), parameters, dtype=dtype)


def merge(folders, output, options=OPTIONS, **settings):
    return merge_folders.merge_folders(config(folders, **settings), output, options)


def digests(folder: pathlib.Path) -> dict[str, bytes]:
    """All files but the card, which has the time in it."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "merge.json"}


def done(folder: pathlib.Path) -> list[str]:
    """Leaves that a journal names."""
    return [json.loads(line) for line in (folder / JOURNAL).read_text().split("\n")[1:-1]]


@contextlib.contextmanager
def stops_after(monkeypatch, leaves: int, error: type[BaseException] = KeyboardInterrupt):
    """A merge that stops when some leaves are done, and on the disk."""
    with monkeypatch.context() as patch:
        patch.setattr(output_files, "_FLUSH_BYTES", 1)
        add, count = output_files._Journal.add, [0]

        def add_and_stop(self, name):
            add(self, name)
            self._last.result()
            count[0] += 1
            if count[0] == leaves:
                raise error

        patch.setattr(output_files._Journal, "add", add_and_stop)
        with pytest.raises(error):
            yield


def run(*words) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, timeout=300)


def test_kill_9_in_the_middle_and_the_same_command_again(llama, tmp_path):
    """The right bytes, nothing left behind, and what was done is not done again."""
    folders = made.experts_of(llama)
    words = ["merge", "--method", "ties", "--density", 0.4, "--base", llama["base"],
             "--max_shard_size", "30KB", "--output", tmp_path / "merged", *folders]
    killed = run("-c", KILLED, *words)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    partial = tmp_path / "merged.partial"
    assert os.listdir(tmp_path) == ["merged.partial"], "no output before it is whole"
    names = done(partial)
    assert 7 <= len(names) < len(made.values(pathlib.Path(folders[0])))
    shutil.copytree(partial, tmp_path / "other.partial")

    again = run("-m", "elm_jax.cli", *words)
    assert again.returncode == 0, again.stderr
    assert f"going on: {len(names)} of " in again.stderr
    merge(folders, tmp_path / "fresh", method="ties", density=0.4, base=llama["base"], weights=None)
    assert digests(tmp_path / "merged") == digests(tmp_path / "fresh")
    assert sorted(os.listdir(tmp_path)) == ["fresh", "merged", "other.partial"]
    assert not (tmp_path / "merged" / JOURNAL).exists()

    # A bit that is flipped in a leaf that was done is still flipped: it was not merged again. Half a line at
    # the journal's end, as a kill may leave it, counts for nothing.
    file = next(iter(sorted((tmp_path / "other.partial").glob("*.safetensors"))))
    length = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    with open(file, "r+b") as spoilt, open(tmp_path / "other.partial" / JOURNAL, "a") as journal:
        spoilt.seek(length)
        byte = spoilt.read(1)[0]
        spoilt.seek(length)
        spoilt.write(bytes([byte ^ 1]))
        journal.write('"model.layers.3')
    merge(folders, tmp_path / "other", method="ties", density=0.4, base=llama["base"], weights=None)
    merged, fresh = digests(tmp_path / "other"), digests(tmp_path / "fresh")
    wrong = [name for name in fresh if merged[name] != fresh[name]]
    assert set(merged) == set(fresh) and wrong == [file.name]
    assert sum(a != b for a, b in zip(merged[file.name], fresh[file.name], strict=True)) == 1


@pytest.mark.parametrize("stage", ["after the leaves", "before the rename", "after the rename"])
def test_interrupted_at_its_very_end(stage, llama, monkeypatch, tmp_path):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    replace = os.replace

    def rename(source, target):
        return interrupt() if str(target) == str(tmp_path / "merged") else replace(source, target)

    with monkeypatch.context() as patch:
        if stage == "after the leaves":
            patch.setattr(merge_folders, "_write_rest", interrupt)
        elif stage == "after the rename":
            patch.setattr(output_files, "end_journal", interrupt)
        else:
            patch.setattr(os, "replace", rename)
        with pytest.raises(KeyboardInterrupt):
            merge(made.experts_of(llama), tmp_path / "merged")
    assert os.listdir(tmp_path) == ["merged" if stage == "after the rename" else "merged.partial"]
    if stage == "after the rename":
        with pytest.raises(InputError, match="exists already"):
            merge(made.experts_of(llama), tmp_path / "merged", method="linear", weights=(3, 2, 1))
    with monkeypatch.context() as patch:
        patch.setattr(stream.LeafMerge, "rows", interrupt)  # nothing is merged again
        facts = merge(made.experts_of(llama), tmp_path / "merged")
    assert facts["method"] == "mean" and facts["output"] == str(tmp_path / "merged")
    assert os.listdir(tmp_path) == ["merged"] and not (tmp_path / "merged" / JOURNAL).exists()
    merge(made.experts_of(llama), tmp_path / "fresh")
    assert digests(tmp_path / "merged") == digests(tmp_path / "fresh")


@pytest.mark.parametrize("stage", ["leaves", "writing"])
@pytest.mark.parametrize("what", ["models", "adapter", "lora"])
def test_an_interrupted_merge_of_models_or_experts_goes_on(
        what, stage, models, experts, monkeypatch, tmp_path):
    folders = models if what == "models" else experts[what]
    if stage == "leaves":
        with stops_after(monkeypatch, 5):
            merge(folders, tmp_path / "merged")
        expected = 5
    else:
        with monkeypatch.context() as patch:
            def interrupt(*_, **__):
                raise KeyboardInterrupt

            patch.setattr(output_files, "empty_workspace", interrupt)  # when all of it was read
            patch.setattr(staging, "QUIET_SECONDS", 0.0)  # nothing was written yet
            with pytest.raises(KeyboardInterrupt):
                merge(folders, tmp_path / "merged")
        expected = None
    assert os.listdir(tmp_path) == ["merged.merging"], "no output before it is whole"
    names = done(tmp_path / "merged.merging")
    plan = merge_folders.plan_merge(config(folders), OPTIONS)
    assert len(names) == (expected or len(plan.leaves))
    counted: list[str] = []
    for leaf in (stream.LeafMerge, merge_overlays.FactorLeaf):
        def rows(self, start, stop, rows=leaf.rows):
            counted.append(self.path)
            return rows(self, start, stop)

        monkeypatch.setattr(leaf, "rows", rows)
    merge(folders, tmp_path / "merged")
    assert not set(counted) & set(names) and set(counted) | set(names) == {leaf.path for leaf in plan.leaves}
    assert os.listdir(tmp_path) == ["merged"]
    merge(folders, tmp_path / "fresh")
    found, fresh = (flat_of(tmp_path / name, what) for name in ("merged", "fresh"))
    assert set(found) == set(fresh) and all(np.array_equal(found[path], fresh[path]) for path in fresh)


def flat_of(folder, what):
    return trees.flatten(load_base(folder).params if what == "models" else load_expert(folder).overlay)


def test_what_another_merge_left_is_not_used(llama, monkeypatch, tmp_path):
    """Of other weights, parameters, parents, order, base, types or shards; all files are of one time."""
    llama = made.copies(llama, tmp_path)
    a, b, c = made.experts_of(llama)
    base = str(llama["base"])
    twin = made.copies({"twin": llama["expert1"]}, tmp_path)["twin"]
    made.set_tensors(twin, {"lm_head.weight": made.peer.read(twin)["lm_head.weight"] * 2})
    for path in tmp_path.rglob("*"):
        os.utime(path, (0, 0))
    plain, equal = {"folders": [a, b, c]}, {"weights": (1, 1, 1)}
    task = {"folders": [a, b], "base": c, "method": "task_arithmetic", "weights": (0.7, 0.3)}
    others = [
        (plain, {"folders": [a, b, c], "weights": (0.6, 0.3, 0.1)}),
        (plain, {"folders": [b, a, c]}),
        ({"folders": [a, a, b], **equal}, {"folders": [a, b, b], **equal}),
        (plain, {"folders": [a, twin, c]}),
        (plain, {"folders": [a, b, c], "dtype": "float32"}),
        (plain, {"folders": [a, b, c], "options": MergeOptions(quiet=True, max_shard_bytes=20_000)}),
        (task, {**task, "folders": [c, b], "base": a}),
        (task, {**task, "base": base}),
        (task, {**task, "scale": 0.5}),
    ]
    for number, (first, second) in enumerate(others):
        output = tmp_path / str(number)
        with stops_after(monkeypatch, 12):
            merge(**first, output=output)
        assert len(done(pathlib.Path(f"{output}.partial"))) == 12
        merge(**second, output=output)
        merge(**second, output=tmp_path / "fresh")
        assert digests(output) == digests(tmp_path / "fresh"), second
        shutil.rmtree(tmp_path / "fresh")
        assert not pathlib.Path(f"{output}.partial").exists()


def test_a_cast_of_the_inputs_makes_another_merge(llama, monkeypatch, tmp_path):
    """Only a config in mergekit's schema can ask for it."""
    from elm_jax.merging.recipes.mergekit_yaml import read_config

    text = "merge_method: linear\nout_dtype: float32\nmodels:\n" + "".join(
        f"- model: {folder}\n  parameters: {{weight: 1}}\n" for folder in made.experts_of(llama))
    (tmp_path / "a.yaml").write_text(text)
    (tmp_path / "b.yaml").write_text(text + "dtype: float16\n")
    with stops_after(monkeypatch, 12):
        merge_folders.merge_folders(read_config(tmp_path / "a.yaml"), tmp_path / "merged", OPTIONS)
    for name in ("merged", "fresh"):
        merge_folders.merge_folders(read_config(tmp_path / "b.yaml"), tmp_path / name, OPTIONS)
    assert digests(tmp_path / "merged") == digests(tmp_path / "fresh")


def test_another_donor_or_tokenizer_makes_another_merge(llama, monkeypatch, tmp_path):
    """Killed when the output had its name: nobody gets it with another folder's files beside the weights."""
    from elm_jax.merging.recipes.mergekit_yaml import read_config

    folders = made.experts_of(llama)
    text = "merge_method: linear\nmodels:\n" + "".join(
        f"- model: {folder}\n  parameters: {{weight: 1}}\n" for folder in folders)
    for name, more in (("plain", ""), ("tokenizer", f"tokenizer_source: {folders[2]}\n"),
                       ("donor", f"base_model: {folders[1]}\n")):
        (tmp_path / f"{name}.yaml").write_text(text + more)

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(output_files, "end_journal", interrupt)
        with pytest.raises(KeyboardInterrupt):
            merge_folders.merge_folders(read_config(tmp_path / "plain.yaml"), tmp_path / "merged", OPTIONS)
    for name in ("tokenizer", "donor"):
        with pytest.raises(InputError, match="exists already"):
            merge_folders.merge_folders(read_config(tmp_path / f"{name}.yaml"), tmp_path / "merged", OPTIONS)
    assert (tmp_path / "merged" / JOURNAL).exists()
    merge_folders.merge_folders(read_config(tmp_path / "plain.yaml"), tmp_path / "merged", OPTIONS)
    assert not (tmp_path / "merged" / JOURNAL).exists()


def test_what_is_allowed_makes_another_merge(tmp_path, monkeypatch):
    """A head that is filled in from the embedding is another one than that of the base."""
    tied = peer.make_family(tmp_path / "families", "llama_tied", "float32")
    untied = made.copies({"own": tied["expert1"]}, tmp_path)["own"]
    head = made.peer.read(untied)["model.embed_tokens.weight"] * 3
    made.set_tensors(untied, {"lm_head.weight": head})
    made.set_config(untied, tie_word_embeddings=False)
    folders = [str(tied["expert0"]), str(untied)]

    def allowing(*names):
        return MergeOptions(quiet=True, allow=names)

    with stops_after(monkeypatch, 20):
        merge(folders, tmp_path / "merged", allowing("configs", "missing"), weights=None)
    for name in ("merged", "fresh"):
        merge(folders, tmp_path / name, allowing("configs", "heads"), weights=None)
    assert digests(tmp_path / "merged") == digests(tmp_path / "fresh")


@pytest.mark.parametrize("what", ["llama", "models"])
def test_two_processes_at_once_are_one_clear_error(what, llama, models, monkeypatch, tmp_path):
    """The second takes nothing away from the first, which ends as if it were alone."""
    folders = made.experts_of(llama) if what == "llama" else models
    inside, go_on = threading.Event(), threading.Event()
    write_merged = output_files.write_merged

    def slow(*words, **options):
        inside.set()
        assert go_on.wait(60)
        write_merged(*words, **options)

    monkeypatch.setattr(output_files, "write_merged", slow)
    first = threading.Thread(target=merge, args=(folders, tmp_path / "merged"))
    first.start()
    try:
        assert inside.wait(60)
        with pytest.raises(InputError, match="Another process is writing this folder"):
            merge(folders, tmp_path / "merged")
    finally:
        go_on.set()
        first.join()
    assert os.listdir(tmp_path) == ["merged"]
    with pytest.raises(InputError, match="exists already"):
        merge(folders, tmp_path / "merged")


AT_ONCE = """
import sys
from elm_jax.cli import main as cli
from elm_jax.runtime import locks
locks.LEAVING_SECONDS = 0.0
sys.exit(cli.main(["merge", *sys.argv[1:]]))
"""


def test_two_processes_at_once_on_the_command_line(llama, tmp_path):
    with staging.resumable(tmp_path / "merged", JOURNAL) as folder:
        (folder / "part").write_text("first")
        second = run("-c", AT_ONCE, "--output", tmp_path / "merged", *made.experts_of(llama))
        assert second.returncode == 2 and "Another process is writing this folder" in second.stderr
        assert "Traceback" not in second.stderr and (folder / "part").read_text() == "first"


FULL_DISK = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
from elm_jax.cli import main as cli
sys.exit(cli.main(["merge", *sys.argv[1:]]))
"""


def test_a_full_disk_is_status_1_and_the_same_command_goes_on(llama, tmp_path):
    """What the files need is laid claim to before anything is merged."""
    words = ["--max_shard_size", "30KB", "--output", tmp_path / "merged", *made.experts_of(llama)]
    full = run("-c", FULL_DISK, *words)
    assert full.returncode == 1 and full.stderr.startswith("elm merge: Cannot write"), full.stderr
    assert "Traceback" not in full.stderr and not (tmp_path / "merged").exists()
    merge(made.experts_of(llama), tmp_path / "merged", weights=None)
    assert os.listdir(tmp_path) == ["merged"]


@pytest.mark.parametrize("what", ["llama", "models", "adapter"])
def test_a_disk_that_fills_up_in_the_middle(what, llama, models, experts, monkeypatch, tmp_path):
    folders = {"llama": made.experts_of(llama), "models": models}.get(what) or experts[what]
    write, left = os.pwrite, [5000 if what == "adapter" else 60_000]

    def fill(descriptor, data, position):
        left[0] -= len(data)
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        return write(descriptor, data, position)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fill)
        with pytest.raises(RunError, match=r"Cannot write(.|\n)*No space left"):
            merge(folders, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    merge(folders, tmp_path / "merged")
    assert os.listdir(tmp_path) == ["merged"]


def test_files_that_were_taken_out_of_an_interrupted_merge_are_merged_again(llama, monkeypatch, tmp_path):
    """The journal alone says nothing of a file that is gone or was cut off."""
    folders = made.experts_of(llama)
    merge(folders, tmp_path / "fresh")
    for number, spoil in enumerate((os.remove, lambda path: os.truncate(path, 5000))):
        output = tmp_path / str(number)
        with stops_after(monkeypatch, 12):
            merge(folders, output)
        spoil(sorted(pathlib.Path(f"{output}.partial").glob("*.safetensors"))[0])
        merge(folders, output)
        assert digests(output) == digests(tmp_path / "fresh")
