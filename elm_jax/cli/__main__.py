"""Makes `python -m elm_jax.cli` the same as the command `elm`."""

import sys

from elm_jax.cli.main import main

sys.exit(main())
