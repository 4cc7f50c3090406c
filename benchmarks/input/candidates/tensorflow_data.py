"""tf.data on TFRecords: decode_and_crop_jpeg of the box alone, then tf.image.resize, as big_vision and TPU code do."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow as tf

from benchmarks.input.candidates import BATCH, SIZE, photo_files

PACKAGES = ("tensorflow-cpu",)

_RECORDS = "photos.tfrecord"


def write(photos: Path, store: Path) -> None:
    with tf.io.TFRecordWriter(str(store / _RECORDS)) as out:
        for file in photo_files(photos):
            image = tf.train.Feature(bytes_list=tf.train.BytesList(value=[file.read_bytes()]))
            out.write(tf.train.Example(features=tf.train.Features(feature={"image": image})).SerializeToString())


def batches(store: Path, *, filter: str, antialias: bool) -> Iterator[np.ndarray]:
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)

    def view(record: tf.Tensor) -> tf.Tensor:
        jpeg = tf.io.parse_single_example(record, {"image": tf.io.FixedLenFeature([], tf.string)})["image"]
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            tf.io.extract_jpeg_shape(jpeg),
            tf.zeros([0, 0, 4], tf.float32),
            area_range=(0.08, 1.0),
            min_object_covered=0,
            use_image_if_no_bounding_boxes=True,
        )
        (top, left, _), (height, width, _) = tf.unstack(begin), tf.unstack(size)
        image = tf.io.decode_and_crop_jpeg(jpeg, tf.stack([top, left, height, width]), channels=3)
        image = tf.image.resize(image, (SIZE, SIZE), method=filter, antialias=antialias)
        image = tf.image.random_flip_left_right(image)
        return tf.cast(tf.clip_by_value(tf.round(image), 0, 255), tf.uint8)

    options = tf.data.Options()
    options.threading.private_threadpool_size = 1
    options.threading.max_intra_op_parallelism = 1
    data = tf.data.TFRecordDataset(str(store / _RECORDS)).repeat().shuffle(512).map(view, num_parallel_calls=1)
    data = data.batch(BATCH, drop_remainder=True).prefetch(1).with_options(options)
    yield from data.as_numpy_iterator()
