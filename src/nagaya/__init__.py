"""Nagaya: a hypervisor platform in one package."""

__version__ = "0.1.0"
