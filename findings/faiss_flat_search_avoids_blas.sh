#!/usr/bin/env bash
# faiss-cpu 1.15 leaves a flat search to BLAS from 128,000 numbers in the queries on, no longer from 20 queries.
# One would guess, from the wiki and from older versions: IndexFlatIP multiplies matrices by BLAS as soon as 20
# queries come at once, and distance_compute_blas_threshold is a number of queries. True: since 1.15 the
# variable is compared with queries x dimensions, and is 128,000; at 384 dimensions (MiniLM) up to 333 queries
# are compared one by one. Which path was taken is told here by the last bits of the similarities.
# Why it matters: faiss is what a router over many keys is measured beside. On one thread 32 queries against a
# million keys took 1.8 s so, and 0.3 s with the threshold set to 1; and a threshold of 20 that code sets for
# older versions now asks for BLAS at every number of queries.
# Versions: faiss-cpu 1.15.1 and 1.11.0, numpy 2.2.6. Date: 2026-11-30.
# Exit status: 0 as described, 1 if that has changed. Installs into a temporary folder, which it removes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
for version in 1.15.1 1.11.0; do
  "$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check \
    "faiss-cpu==$version" numpy==2.2.6
  "$folder/env/bin/python" - "$version" <<'PYTHON'
import sys

import faiss
import numpy as np

DIMENSIONS = 384
draw = np.random.default_rng(0)
keys = draw.normal(size=(2_000, DIMENSIONS)).astype(np.float32)
queries = draw.normal(size=(400, DIMENSIONS)).astype(np.float32)
index = faiss.IndexFlatIP(DIMENSIONS)
index.add(keys)
default = faiss.cvar.distance_compute_blas_threshold


def similarities(number, threshold):
    """Best similarity of each of so many queries."""
    faiss.cvar.distance_compute_blas_threshold = threshold
    return index.search(queries[:number], 1)[0]


def one_by_one(number):
    """Whether the default takes the path without BLAS, by the last bits."""
    by_default, without, with_blas = (similarities(number, one) for one in (default, 2**31 - 1, 0))
    assert not np.array_equal(without, with_blas), "the two paths give the same bits"
    assert np.array_equal(by_default, without) or np.array_equal(by_default, with_blas)
    return np.array_equal(by_default, without)


most = max(number for number in range(16, 400) if one_by_one(number))
print(f"faiss {faiss.__version__}: threshold {default}, one by one up to {most} queries of {DIMENSIONS}")
expected = {"1.15.1": (128_000, 333), "1.11.0": (20, 19)}[sys.argv[1]]
sys.exit((default, most) != expected)
PYTHON
done
