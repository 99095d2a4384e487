"""The server's limits that its command shows, apart from the modules that need the extra `server`."""

MAX_BODY_MIB = 16  # several times the longest prompt of a context of 128k tokens, escapes included
