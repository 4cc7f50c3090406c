"""What the tests of faults share: a real S3 server and the faulty network in front of it."""

from tests.conftest import Tell
from tests.faults.object_store import bucket, images, proxy, server

__all__ = ["Tell", "bucket", "images", "proxy", "server"]
