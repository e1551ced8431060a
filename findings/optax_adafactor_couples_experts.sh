#!/usr/bin/env bash
# optax's Adafactor couples the experts of a stacked kernel once there are more of them than the model is wide.
# One would guess: of a leaf [experts, in, out] the last two axes are factored, and the first one is a batch, as
# T5X's Adafactor treats its axis `expert`. True: scale_by_factored_rms factors the two largest axes, whatever
# they are. With 64 experts of 128 x 512 each expert has statistics of its own; with 256 experts the mean is
# taken over experts, and one expert's gradient changes another one's step, without a word.
# Why it matters: Switch-Base comes with 128 and 256 experts, adapters and small models are narrow, and a
# recipe of T5X's that is run by optax trains something else. optax.adafactor is made of the same function.
# Versions: optax 0.2.8, jax 0.10.2, numpy 2.2.6. Date: 2026-11-30.
# Exit status: 0 as described, 1 if that has changed. Installs into a temporary folder, which it removes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check optax==0.2.8 jax==0.10.2 numpy==2.2.6
JAX_PLATFORMS=cpu "$folder/env/bin/python" - <<'PYTHON'
import sys

import numpy as np
import optax

INNER, OUTER = 128, 512


def change_of_the_first(experts):
    """Largest relative change of the first expert's step where only the last one's gradient is ten times as large."""
    draw = np.random.default_rng(0)
    params = draw.normal(size=(experts, INNER, OUTER)).astype(np.float32)
    gradient = draw.normal(size=params.shape).astype(np.float32)
    other = gradient.copy()
    other[-1] *= 10
    rule = optax.scale_by_factored_rms()
    one, two = (np.asarray(rule.update(each, rule.init(params), params)[0][0]) for each in (gradient, other))
    return float(np.max(np.abs(two / one - 1)))


found = {experts: change_of_the_first(experts) for experts in (64, 256)}
for experts, change in found.items():
    print(f"{experts} experts of {INNER} x {OUTER}: the first one's step changes by {change:.1%}")
sys.exit(not (found[64] < 1e-6 and found[256] > 0.01))
PYTHON
