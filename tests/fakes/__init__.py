"""Fakes that stand at sockets: what is tested talks to them as to the real thing."""
