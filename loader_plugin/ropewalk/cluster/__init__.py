"""The OpenAI-compatible server on several replicas, under Ray Serve; needs the extra `cluster`. See docs/cluster.md.

serve run ropewalk.cluster:app model=FOLDER replicas=2
ropewalk serve FOLDER --replicas 2
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve import Application


def app(arguments: dict[str, Any]) -> Application:
    """The application for `serve run`, `serve deploy` and `serve build`. arguments: the options of `ropewalk serve`.

    Raises:
        RequestError: an unknown option, or a value that it does not take. ConfigError: the cluster has too few cards.
    """
    from ropewalk.cluster.deploy import fronted  # whoever imports the package has not asked for Ray

    return fronted(arguments)
