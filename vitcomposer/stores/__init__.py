"""Reads and writes object stores such as S3: addresses, objects, downloads."""
