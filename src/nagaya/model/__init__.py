"""Pure, frozen descriptions of what Nagaya manages. No input or output happens here."""
