"""The names of all files in a run folder.

RUN/config.yaml         the whole configuration
    identity.json       configuration and images that the run began with, with a digest
    environment.json    versions, devices and the commit of the code
    class_names.json    what the outputs stand for: a copy of the file of the training split
    metrics.jsonl       a line per logged step
    summary.json        what came out, from the end of training on
    predictions.csv     what the last evaluation said about each image, with predictions_ema.csv of the averaged weights
    report.html         the whole story on one page
    best/               the checkpoint of the best evaluation, by the name that it has in checkpoints/
    checkpoints/        ep3-ba1200-rank0.pt: after epoch 3 and step 1200; latest-rank0.pt leads to the newest
    tensorboard/        of run.loggers
    eval/               of `vitcomposer eval`
    .remote.json        of run.remote, as .remote/
.RUN.lock               beside it, as folder_lock names it: who writes there
"""

import re
from pathlib import Path

CONFIG = "config.yaml"
IDENTITY = "identity.json"
ENVIRONMENT = "environment.json"
CLASS_NAMES = "class_names.json"
METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
PREDICTIONS, PREDICTIONS_EMA = "predictions.csv", "predictions_ema.csv"
REPORT = "report.html"
CHECKPOINTS = "checkpoints"
LATEST = "latest-rank0.pt"  # in CHECKPOINTS: a link to the newest
LATEST_CHECKPOINT = Path(CHECKPOINTS, LATEST)
CHECKPOINT = re.compile(r"ep(\d+)-ba(\d+)-rank0\.pt")  # in CHECKPOINTS, as Composer names them: epoch and step
BEST = "best"
TENSORBOARD = "tensorboard"
EVALUATION = "eval"
REMOTE_STATE = ".remote.json"  # what of the folder has arrived, so that a new start sends nothing twice
REMOTE_HELD = ".remote"  # a folder with a second name of the checkpoint that is being sent
REMOTE_POINTER = f"{CHECKPOINTS}/whole.json"  # on the object store alone: written after the checkpoints that it names
