"""`python -m elm_jax.cli` is `elm`."""

import sys

from elm_jax.cli.main import main

sys.exit(main())
