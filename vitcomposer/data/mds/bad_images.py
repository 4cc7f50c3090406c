"""Counts the images of a split that cannot be decoded, over the loader processes of a rank."""

import logging
import multiprocessing
from collections.abc import Iterable
from ctypes import c_bool, c_char, c_long

from vitcomposer.errors import ConfigError

log = logging.getLogger(__name__)

_NAMED = 3  # of the bad images, in the error


class BadImages:
    """The images of a split that could not be decoded. Must be made before the workers are forked.

    Args:
        num_samples: Of the whole split; ``max_fraction`` of them may be bad, whichever rank finds them.
        split: Its folder or address.
        remedy: What lists the bad images.
    """

    def __init__(self, num_samples: int, max_fraction: float, *, split: str, remedy: str) -> None:
        self.num_samples, self._max_fraction = num_samples, max_fraction
        self.split, self.remedy = split, remedy
        self._is_bad = multiprocessing.RawArray(c_bool, num_samples)
        self._count = multiprocessing.Value(c_long)
        self._named = multiprocessing.RawArray(c_char, 2048)

    def __len__(self) -> int:
        """Different bad images: a sample counts once, however often it comes."""
        return self._count.value

    def ids(self) -> list[int]:
        """Their sample_id, in order."""
        return [at for at, bad in enumerate(self._is_bad) if bad] if len(self) else []

    def learn(self, ids: Iterable[int]) -> None:
        """Take over what other ranks, or the run before it was resumed, have found.

        Raises:
            ConfigError: As :meth:`add`.
        """
        with self._count.get_lock():
            for sample_id in ids:
                self._count.value += not self._is_bad[sample_id]
                self._is_bad[sample_id] = True
        self._check()

    def add(self, sample_id: int, place: str, fault: str, outcome: str) -> None:
        """Count an image and, the first time, say where it lies, what is wrong and what becomes of it.

        Raises:
            ConfigError: There are more than the split may have.
        """
        with self._count.get_lock():
            if new := not self._is_bad[sample_id]:
                self._is_bad[sample_id] = True
                self._count.value += 1
                if self._count.value <= _NAMED:
                    named = [*filter(None, [self._named.value.decode(errors="replace")]), f"{place} ({fault})"]
                    self._named.value = ", ".join(named).encode()[:2000]
        if new:
            log.warning("%s/%s (sample_id %d) cannot be decoded: %s. %s", self.split, place, sample_id, fault, outcome)
        self._check()

    def _check(self) -> None:
        count = len(self)
        if count > self._max_fraction * self.num_samples:
            named = self._named.value.decode(errors="replace")
            first = f", first {named}" if named else ""
            raise ConfigError(
                f"data.max_bad_fraction must be at least the share of images that cannot be decoded, which is "
                f"{count} of {self.num_samples:,} in {self.split} ({count / self.num_samples:.2g}) or more{first}; got "
                f"{self._max_fraction:g}. {self.remedy} lists them: write the split again without them, or raise "
                "data.max_bad_fraction."
            )
