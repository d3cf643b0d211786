"""The fixture of all tests of the exchange. What it gives is described in `worlds`."""

import os
import sys

sys.path.append(os.path.dirname(__file__))

from worlds import world

__all__ = ["world"]
