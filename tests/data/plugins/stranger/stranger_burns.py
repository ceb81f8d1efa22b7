"""A plugin that cannot be imported. It counts how often that was tried."""

import sys

sys.burned = getattr(sys, "burned", 0) + 1
raise SystemError("it burns")
