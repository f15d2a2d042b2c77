"""Networks of machines."""
