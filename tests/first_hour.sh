#!/usr/bin/env bash
# The first hour, as somebody types it who follows what each command prints under "Next:". Every command must end with 0
# and without a traceback, and every block with a command that works.
#
#   tests/first_hour.sh [PHOTOS.zip]     without a zip: photographs that are made here, two classes and a mess
#
# It works in an empty folder and trains for a few steps; `vitcomposer` must be on the PATH.
set -euo pipefail
zip=${1:-}
here=$(pwd)
[ -z "$(ls -A "$here")" ] || { echo "run it in an empty folder"; exit 2; }

if [ -n "$zip" ]; then
    mkdir my_photos
    python -m zipfile -e "$zip" my_photos
else
    python - <<'PYTHON'
import numpy as np
from PIL import Image
from pathlib import Path

rng = np.random.default_rng(0)
for label, name in enumerate(("ant", "bee")):
    folder = Path("my_photos", name)
    folder.mkdir(parents=True)
    for i in range(60):
        height, width = rng.integers(70, 130, 2)
        colour = np.array([[150, 90, 60], [60, 90, 150]][label])  # what tells the classes apart
        pixels = colour + rng.normal(0, 40, (height, width, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.jpg")
PYTHON
fi

# What lies in real folders too: odd names, CMYK, a camera's rotation, 16 bits, an animation, a note, half a file.
python - <<'PYTHON'
import numpy as np
from PIL import Image
from pathlib import Path

folder = sorted(path for path in Path("my_photos").rglob("*") if path.is_dir())[-1]
rng = np.random.default_rng(1)
photo = Image.fromarray(rng.integers(0, 255, (90, 120, 3), dtype=np.uint8))
photo.save(folder / "Grüße, 'so' & (1).JPG", "jpeg")
photo.convert("CMYK").save(folder / "print.jpg")
exif = Image.Exif()
exif[0x0112] = 6
photo.save(folder / "turned.jpg", exif=exif)
Image.fromarray(rng.integers(0, 65535, (90, 120), dtype=np.uint16)).save(folder / "scan.png")
photo.convert("P").save(folder / "moving.gif", save_all=True, append_images=[photo.rotate(90).convert("P")])
(folder / "notes.txt").write_text("not an image\n")
whole = (folder / "print.jpg").read_bytes()
(folder / "half.jpg").write_bytes(whole[: len(whole) // 3])
PYTHON

# Small enough for a test; everything else is what `new` chose.
small=(max_duration=2ep model.depth=2 model.local_up_to_layer=1 data.num_workers=1 run.eval_interval=1ep)

run() { # prints the command, runs it, keeps what it prints for `next`
    echo "\$ $*"
    "$@" > out.txt 2> err.txt || { echo "exit $?"; cat out.txt err.txt; exit 1; }
    ! grep -n Traceback out.txt err.txt || exit 1
    tail -12 out.txt | sed 's/^/    /'
}

next() { # the printed command that starts with these words
    local line
    line=$(sed -n '/^Next:/,$p' out.txt | sed 's/^Next://; s/^ *//; s/  *#.*//' | grep -m1 "^$*") || {
        echo "no next command '$*' was printed:"; cat out.txt; exit 1
    }
    echo "$line"
}

type_next() { # types the printed command, with more words behind it where a test needs them
    local line
    line=$(next "$1")
    shift
    [ $# -eq 0 ] || line+=" $(printf '%q ' "$@")"
    eval "run $line"
}

run vitcomposer new my_photos
[ -s my_photos.yaml ] && cp out.txt new.txt
type_next "vitcomposer convert"
type_next "vitcomposer preview"
type_next "vitcomposer check" "${small[@]}"
type_next "vitcomposer train"
cp out.txt trained.txt
[ -s runs/my_photos/report.html ] && [ -s runs/my_photos/summary.json ]
cp new.txt out.txt
type_next "vitcomposer predict"
cp trained.txt out.txt
type_next "vitcomposer export"
run vitcomposer report runs/my_photos
find my_photos -name half.jpg -delete # with it the exit code is 1, for an image that cannot be read
run vitcomposer predict exported my_photos --format csv --out predictions.csv
[ "$(wc -l < predictions.csv)" -gt 100 ]
echo "the first hour works"
