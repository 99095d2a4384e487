"""The ropewalk model loader, as an extension of text-generation-webui."""

import logging

params = {"display_name": "ropewalk"}

try:
    from ropewalk.webui import register
except ImportError as error:  # the server would end
    logging.getLogger(__name__).error("the ropewalk loader is not installed in this Python environment: %s", error)
else:
    register()
