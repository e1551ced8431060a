"""Strict JAX on eight simulated devices for every test; helpers to import; what several folders share."""

import atexit
import ctypes
import dataclasses
import gc
import os
import pathlib
import shutil
import sys
import tempfile

# Tests compile much and run little: the compiler's expensive passes are left out, and the older of its two
# code generators takes a fifth of the time. In one piece: in two it rounds some last bits differently.
# ELM_TESTS_COMPILER=own leaves the generator to XLA, as users' programs do; `.ci/run` has files that need it.
FLAGS = ("--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0",
         "--xla_llvm_disable_expensive_passes=true")
if os.environ.get("ELM_TESTS_COMPILER") != "own":
    FLAGS += ("--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1")
given = os.environ.get("XLA_FLAGS", "").split()
os.environ["XLA_FLAGS"] = " ".join(given + [flag for flag in FLAGS if flag not in given])
# What one process of a run has compiled, the others read: workers of pytest-xdist, programs of the tests.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="elm-compiled-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
# zstandard is among the test extras for this cache: zlib, in its place, took longer by a twentieth.
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"  # to write a small one takes as long
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# For workers of pytest-xdist, which start after this: many heaps keep what was freed, in pieces.
os.environ.setdefault("MALLOC_ARENA_MAX", "2")
sys.path.insert(0, str(pathlib.Path(__file__).parent / "helpers"))

import jax  # noqa: E402
import pytest  # noqa: E402

from elm_jax.merging import stream  # noqa: E402
from elm_jax.runtime import locks  # noqa: E402

locks.LEAVING_SECONDS = 0.0  # what is refused here is held by a process that does not leave
stream._LEAST >>= 3  # leaves are small here: most of their slices would be padding
jax.config.update("jax_numpy_rank_promotion", "raise")
gc.disable()  # until all is imported and collected: what the packages made stays, and is looked at in vain


def machine_bytes() -> int:
    """Memory of this machine, or of the container around this process; 0 where the system does not say it."""
    limits = [pathlib.Path("/sys/fs/cgroup", name) for name in ("memory.max", "memory/memory.limit_in_bytes")]
    found = [path.read_text().strip() for path in limits if path.exists()]
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found.append(str(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")))
    return min((int(size) for size in found if size.isdigit()), default=0)


# To let go costs a twelfth of the tests' time where it happens at every third file: what several files use
# is traced and compiled again. Two thirds are left to the system, to files in memory and other processes.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
MOST_MEMORY = max(2_000_000_000, machine_bytes() // (3 * WORKERS))
GROWTH = 200_000_000
"""Bytes from which on a process lets go of what earlier files compiled, and gained since it did."""
held = 0
"""Bytes that this process kept when it last let go."""


def pytest_collection_finish() -> None:
    """No later collection of garbage goes through what was imported."""
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)  # tracing makes many objects that live on: each look at them takes long
    gc.enable()


@pytest.fixture(scope="module", autouse=True)
def little_memory():
    """Compiled programs do not pile up; one that is needed again is read from the run's cache."""
    global held
    yield
    if resident_bytes() < max(MOST_MEMORY, held + GROWTH):
        return
    for module, name in (("step", "compile_step"), ("early_end", "compile_loss"),
                         ("stack.stacked_step", "compile_stack")):
        if loaded := sys.modules.get(f"elm_jax.training.{module}"):
            getattr(loaded, name).cache_clear()
    jax.clear_caches()
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    held = resident_bytes()


def resident_bytes() -> int:
    """Memory of this process; 0 where no file of the system says it."""
    pages = pathlib.Path("/proc/self/statm")
    return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if pages.exists() else 0


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Sentences of the embedded passages."""
    from elm_jax.tasks.embedded.datasets import passages

    return [line for passage in list(passages())[:400] for line in passage.split("\n") if line]


@pytest.fixture(scope="session")
def vocabulary_proto(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A SentencePiece model of 212 pieces: 312 ids on 320 rows, as 32,100 stand on 32,128."""
    import hf_folders

    path: pathlib.Path = tmp_path_factory.mktemp("vocabulary") / "v.model"
    return hf_folders.make_vocabulary(path, texts)


@dataclasses.dataclass
class World:
    """What the tests of the workflows share; they write elsewhere."""

    folder: pathlib.Path
    base: object
    other_base: object
    topic: object
    review: object
    dataset: object
    data: object
    library: object


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """One base, three experts and a library."""
    import tiny_study as tiny

    from elm_jax.workflows.build_library import build_library

    folder = tmp_path_factory.mktemp("world")
    base = tiny.make_base(folder / "base")
    topic = tiny.make_expert(base, folder / "topic")
    review = tiny.make_expert(base, folder / "review", task=tiny.REVIEW)
    dataset = tiny.make_expert(base, folder / "dataset", task="mini_topic", kind="dataset",
                               expert_id="topic-de")
    data = tiny.make_data(base, folder)
    library = build_library(folder / "library", [folder / "topic" / "expert", folder / "review"], data,
                            encoder="tfidf", instances_per_expert=40)
    other_base = tiny.make_base(folder / "other", seed=1)
    return World(folder, base, other_base, topic, review, dataset, data, library)
