"""``moda visualize`` as a script; see ``--help``."""

from moda_cli import script

main = script("visualize")

if __name__ == "__main__":
    raise SystemExit(main())
