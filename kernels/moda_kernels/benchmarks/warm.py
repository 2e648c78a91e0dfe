"""Compile the kernels of some (case, variant) pairs on short copies of the cases: ``python -m moda_kernels.benchmarks.warm``.

Run by ``kernels.py`` in several processes before it measures; all that is left behind is Triton's compilation cache.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys

from .gate import GATE_LENGTH
from .variants import VARIANTS, bind

log = logging.getLogger(__name__)


def main(table: str, only: str, work: str) -> None:
    from .cases import TABLES, draw

    cases = [c for c in TABLES[table] if not only or only in c.name]
    for index, name in json.loads(work):
        case = dataclasses.replace(cases[index], T=GATE_LENGTH)
        try:
            bound = bind(VARIANTS[name], case, draw(case))
            saved = bound.forward()
            bound.backward(saved)
            if not case.sequence and bound.backward_add is not None:
                bound.backward_add(saved)
        except Exception as error:  # met again, and recorded, when it is measured
            log.warning("%s %s: %s", case.name, name, error)


if __name__ == "__main__":
    main(*sys.argv[1:4])
