"""``moda report`` as a script; see ``--help``."""

from moda_cli import script

main = script("report")

if __name__ == "__main__":
    raise SystemExit(main())
