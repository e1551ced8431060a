"""Rules of the repository that no linter knows."""

import ast
import configparser
import functools
import re
import subprocess
import sys

import pytest
from checkout import ROOT

from elm_jax.cli import gin_config
from elm_jax.models import families
from elm_jax.runtime import trees

SOURCES = sorted((ROOT / "elm_jax").rglob("*.py"))
VERBS = ", ".join(f"elm_jax.cli.{path.stem}" for path in SOURCES
                  if path.parent.name == "cli" and not path.stem.startswith("__"))
"""The modules that `elm` imports to run a verb."""
GIN_FILES = sorted((ROOT / "gin").rglob("*.gin"))


@functools.cache
def imported(path):
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


def test_elm_jax_never_imports_the_task_registries():
    found = {path.name for path in SOURCES for name in imported(path) if name.startswith("elm_jax.tasks")}
    assert found == set()


def test_only_the_data_door_imports_tensorflow_and_seqio():
    found = {path.name for path in SOURCES for name in imported(path)
             if name.split(".")[0] in ("tensorflow", "seqio", "tensorflow_datasets")}
    assert found == {"seqio_tasks.py", "tfds_rows.py"}


def test_only_config_imports_gin():
    found = {path.name for path in SOURCES for name in imported(path) if name.split(".")[0] == "gin"}
    assert found == {"gin_config.py"}


def test_only_the_hub_s_door_downloads():
    """A model that the user names on the hub is fetched in one place; nothing else has a way to."""
    clients = {"requests", "urllib", "urllib3", "http", "httpx", "aiohttp", "socket", "ftplib",
               "huggingface_hub", "datasets", "wget", "gdown", "pooch", "kagglehub", "transformers",
               "sentence_transformers"}
    modules = [*SOURCES, *sorted((ROOT / "tasks").rglob("*.py"))]
    found = {(path.name, name.split(".")[0]) for path in modules for name in imported(path)
             if name.split(".")[0] in clients}
    # Not downloads: processes of one run talk to each other, a host's name, the cloud host's own notices.
    talk = {("lifeline.py", "socket"), ("leases.py", "socket"), ("leftovers.py", "socket"),
            ("preemption.py", "urllib")}
    assert found == {("places.py", "huggingface_hub"), ("verify.py", "transformers"),
                     ("peft_peer.py", "transformers")} | talk
    program = (f"import elm_jax.cli.execution, {VERBS}, sys\n"
               "assert not {'huggingface_hub', 'transformers', 'requests'} & set(sys.modules)\n")
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_nothing_read_from_disk_is_run():
    words = re.compile(r"\bpickle\b(?!\.$)|allow_pickle=True|\beval\(|\bexec\(|yaml\.load\(|yaml\.unsafe")
    calls = {path.name: words.findall(re.sub(r'""".*?"""|#.*', "", path.read_text(), flags=re.DOTALL))
             for path in SOURCES}
    found = {name: hits for name, hits in calls.items() if hits}
    assert all(name == "templates.py" for name in found), found


def test_the_gin_folder_never_hides_gin():
    assert not list((ROOT / "gin").rglob("__init__.py"))


def test_import_needs_no_tensorflow():
    program = (f"import elm_jax.cli.execution, {VERBS}, sys\n"
               "assert 'tensorflow' not in sys.modules and 'seqio' not in sys.modules\n"
               "assert 'matplotlib' not in sys.modules and 'sklearn' not in sys.modules\n")
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


OWN_GIN_FILES = [path for path in GIN_FILES if path.parent.name != "t5x"]
"""Those that `elm` reads; tests/t5x has T5X read the others."""


@pytest.mark.parametrize("path", OWN_GIN_FILES, ids=lambda path: str(path.relative_to(ROOT / "gin")))
def test_every_gin_file_parses(path):
    gin_config.parse([str(path)], [])


@pytest.mark.parametrize("path", [path for path in GIN_FILES if path.parent.name == "models"],
                         ids=lambda path: path.stem)
def test_every_size_builds(path):
    gin_config.parse([str(path)], [])
    name, = (name for name in gin_config.NETWORKS if gin_config.is_bound(f"{name}.vocab_size"))
    network = families.network_of(gin_config.build(name))
    assert network.config.emb_dim >= 128
    count = re.search(r"([\d,]{7,}) parameters", path.read_text())[1]
    assert f"{trees.count(network.abstract_params()):,}" == count


@pytest.mark.parametrize("path", [path for path in GIN_FILES if path.parent.name != "models"],
                         ids=lambda path: path.stem)
def test_required_macros_are_never_bound_again(path):
    text = path.read_text()
    for macro in re.findall(r"^(\w+) = %gin\.REQUIRED", text, re.MULTILINE):
        assert len(re.findall(rf"^{macro} = ", text, re.MULTILINE)) == 1, macro


def test_setup_lists_every_package():
    """A package that setup.cfg forgets imports from a checkout, and fails from the wheel only."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    listed = set(setup["options"]["packages"].split())
    found = {".".join(path.parent.relative_to(ROOT).parts)
             for path in (ROOT / "elm_jax").rglob("__init__.py")}
    found |= {".".join(("elm_jax", *path.parent.relative_to(ROOT).parts))
              for path in (ROOT / "tasks").rglob("__init__.py")}
    assert listed == found | {"elm_jax.gin"}


def test_setup_packs_every_file_of_gin_and_tasks():
    """So does a data file: from a checkout it is found, from the wheel only if a pattern names it."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    packed = {path for package, patterns in setup["options.package_data"].items()
              for pattern in patterns.split(",")
              for path in ROOT.joinpath(*package.split(".")[1:]).glob(pattern.strip())}
    found = {path for folder in ("gin", "tasks") for path in (ROOT / folder).rglob("*.*")
             if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert found == packed
