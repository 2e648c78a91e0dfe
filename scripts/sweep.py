"""``moda sweep`` as a script; see ``--help``."""

from moda_cli import script

main = script("sweep")

if __name__ == "__main__":
    raise SystemExit(main())
