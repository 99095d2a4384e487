"""The engine behind the web interface that other programs know from OpenAI. Needs the extra `server`."""
