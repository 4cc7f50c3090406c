"""Weighted nearest neighbours in the features of a trunk (arXiv:1805.01978; DINO's protocol, 2104.14294)."""

from functools import partial

from composer import Trainer

from vitcomposer.callbacks import build_knn_monitor
from vitcomposer.data.evaluation import build_centre_crops, open_images
from vitcomposer.schema import Neighbors
from vitcomposer.tasks import EmbeddingTask
from vitcomposer.training.evaluate_only import build_measurement
from vitcomposer.training.network import build_network
from vitcomposer.training.setup import prepare
from vitcomposer.training.trainer import check_evaluation_size


def build(cfg: Neighbors) -> Trainer:
    """A Trainer without a step: the monitor's measurement before the first one is all that happens.

    Raises:
        ConfigError: A value or a combination that cannot run, before any image is read.
    """
    cfg, share = prepare(cfg)
    size = share.device_eval_batch_size
    trunk = build_network(cfg.model, cfg.init)
    check_evaluation_size(cfg, trunk)
    task = EmbeddingTask(trunk)
    crops = partial(build_centre_crops, cfg, mean=cfg.mean, std=cfg.std, device_batch_size=size)
    train = crops(open_images(cfg, "train", batch_size=size), num_samples=cfg.knn.train_samples)
    val = crops(open_images(cfg, "val", batch_size=size))
    monitor = build_knn_monitor(cfg.knn, task, train, val, key="knn")
    return build_measurement(cfg, share, task=task, data=train, callbacks=[monitor])
