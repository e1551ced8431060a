"""Lets the tests of this folder import their helpers and the tiny study."""

import pathlib
import sys

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "workflows")]
