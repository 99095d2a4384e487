"""For all tests of the cluster."""

from __future__ import annotations

import os

from hypothesis import settings

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # Ray reports how it is used, unless told otherwise before it starts
settings.register_profile("busy machine", deadline=None)
settings.load_profile("busy machine")
