"""`python -m moefold`, the same as `moefold`."""

from moefold.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
