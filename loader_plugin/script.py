"""The ropewalk model loader, as an extension of text-generation-webui."""

from modules.logging_colors import logger  # the web UI's own: it silences all others

params = {"display_name": "ropewalk"}

try:
    from ropewalk.webui import register
except ImportError as error:  # it would end the server
    logger.error("the ropewalk loader is not installed in this Python environment: %s", error)
else:
    register()
