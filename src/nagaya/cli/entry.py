"""Where ``nagaya`` starts. ``--version`` is answered before anything else is loaded."""

import gc
import sys


def main() -> int:
    if sys.argv[1:] in (["--version"], ["-V"], ["version"]):
        from nagaya import __version__

        print(f"nagaya {__version__}")
        return 0
    gc.disable()  # what is loaded is never freed; looking through it again and again is a fifth of the start
    from nagaya.cli.app import run

    gc.freeze()
    gc.enable()
    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
