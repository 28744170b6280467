"""Lets the tests of this folder import its world and its fuzz driver."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
