"""``python -m moda_cli`` and ``torchrun -m moda_cli train CONFIG``."""

from moda_cli import main

if __name__ == "__main__":
    raise SystemExit(main())
