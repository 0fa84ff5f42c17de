"""Storage of artifacts: a folder, or a bucket with a cache on this machine."""

from pathlib import Path

from pipeline.storage.bucket import Bucket, bucket_of
from pipeline.storage.storage import Local, Storage

__all__ = ["Bucket", "Local", "Storage", "bucket_of", "storage_at"]


def storage_at(place: Path | str) -> Storage:
    """The storage at a folder (made absolute) or at a URI."""
    if isinstance(place, str) and "://" in place:
        return Bucket(place)
    return Local(Path(place).expanduser().absolute())
