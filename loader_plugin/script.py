"""The ropewalk model loader, as an extension of text-generation-webui."""

from modules.logging_colors import logger  # of the web UI, which silences every other

params = {"display_name": "ropewalk"}

try:
    from ropewalk.webui import register
except ImportError as error:  # the server would end
    logger.error("the ropewalk loader is not installed in this Python environment: %s", error)
else:
    register()
