"""``moda eval`` as a script; see ``--help``."""

from moda_cli import script

main = script("eval", "compare")

if __name__ == "__main__":
    raise SystemExit(main())
