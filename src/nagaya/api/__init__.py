"""The HTTP API: REST under /api/v1, with the console as a WebSocket and the events as server-sent events."""
