# SPDX-License-Identifier: Apache-2.0
"""Folders of object stores, behind URLs that fsspec opens (gs://, s3://).

In: a URL. Out: `connect`, the store's file system and the folder's path in it; `Bucket`, which
writes a folder's objects, each whole or not at all, and tries again what a store refuses for a
moment. Not done here: what the objects mean; reading weights by byte ranges (`weights.storage`);
one holder at a time (`distributed.lease`).
"""

from dsjax.buckets.bucket import Bucket, Place, new_digest, open_place
from dsjax.buckets.connection import connect, reason
from dsjax.buckets.retry import again
from dsjax.buckets.scratch import process_lives, remove_left_behind, scratch_folder

__all__ = [
    "Bucket",
    "Place",
    "again",
    "connect",
    "new_digest",
    "open_place",
    "process_lives",
    "reason",
    "remove_left_behind",
    "scratch_folder",
]
