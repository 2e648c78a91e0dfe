"""``moda prepare`` as a script; see ``--help``."""

from moda_cli import script

main = script("prepare")

if __name__ == "__main__":
    raise SystemExit(main())
