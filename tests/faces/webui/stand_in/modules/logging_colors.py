import logging
import sys

logger = logging.getLogger("webui-stand-in")
logger.addHandler(logging.StreamHandler(sys.stderr))
logger.setLevel(logging.INFO)
logging.basicConfig(handlers=[logging.NullHandler()])  # every other logger is silenced
