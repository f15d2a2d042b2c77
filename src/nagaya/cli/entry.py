"""Where ``nagaya`` starts. ``--version`` is answered before anything else is loaded."""

import sys


def main() -> int:
    if sys.argv[1:] in (["--version"], ["-V"], ["version"]):
        from nagaya import __version__

        print(f"nagaya {__version__}")
        return 0
    from nagaya.cli.app import run

    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
