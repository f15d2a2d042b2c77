"""The handlers, one file per noun. Each is a few lines: decoding is done before it, errors are answered after it."""
