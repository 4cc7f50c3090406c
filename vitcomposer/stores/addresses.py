"""Checks addresses of object stores, and keeps the secrets in them out of messages."""

import os
import re

_PASSWORD = re.compile(r"(?<=://)[^/\s'\"]*:[^/\s'\"]*@")
_SIGNED = re.compile(r"(?i)([?&](?:x-amz-\w+|[\w-]*(?:sig|token|key|secret|credential|password)[\w-]*)=)[^&\s'\"]+")


def masked(text: str) -> str:
    """A text without passwords and signatures of the addresses in it."""
    return _SIGNED.sub(r"\1***", _PASSWORD.sub("***@", text))


def s3_endpoint() -> str:
    """Where requests to ``s3://`` go, for a message."""
    return masked(os.environ.get("S3_ENDPOINT_URL") or "AWS (S3_ENDPOINT_URL is not set)")
