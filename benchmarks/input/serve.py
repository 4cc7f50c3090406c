"""The process of one candidate: makes batches when it is told to over a pipe, or writes what a candidate reads.

Run from the checkout, under the interpreter of the candidate's peer::

    python -m benchmarks.input.serve '{"module": ..., "store": ..., "options": {...}}'

Every line of standard input is a number of images to process; every answer is a line of JSON on standard output.
"""

import json
import os
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any


def main(job: dict[str, Any]) -> None:
    # Libraries print what they like: only this file object leads to the benchmark.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    module = import_module(f"benchmarks.input.candidates.{job['module']}")
    if "photos" in job:
        module.write(Path(job["photos"]), Path(job["store"]), **job["options"])
        sys.stderr.flush()
        os._exit(0)  # when FFCV's writer has finished its file, Python at times hangs as it ends
    batches = module.batches(Path(job["store"]), **job["options"])
    # Compilers and allocators have done their work after the first batches.
    for _ in range(3):
        crops = next(batches)
    crops = crops if isinstance(crops, list) else [crops]
    first = {
        "batch": len(crops[0]),
        "shapes": [list(crop.shape[1:]) for crop in crops],
        "dtype": str(crops[0].dtype).removeprefix("torch."),
        "versions": {name: version(name) for name in module.PACKAGES},
    }
    print(json.dumps(first), file=answers)
    for line in sys.stdin:
        done, wanted = 0, int(line)
        while done < wanted:
            crops = next(batches)
            done += len(crops[0] if isinstance(crops, list) else crops)
        print(json.dumps({"images": done}), file=answers)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
