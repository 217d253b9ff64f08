# SPDX-License-Identifier: Apache-2.0
"""The way to an object store: the library that knows it, and what it says when it refuses.

In: a URL. Out: an fsspec file system. Credentials are found by the store's own library (gcsfs,
s3fs, huggingface_hub). Not done here: reading and writing.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import fsspec

from dsjax.errors import ConfigError

_LIBRARIES: Mapping[str, str] = MappingProxyType(
    {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "s3a": "s3fs"}
)
"""Protocol -> the library that reads it."""


def connect(url: str, config_field: str, **options: Any) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the file system of a URL, and the folder's path in it.

    Args:
        url: of a folder or file.
        config_field: what the message of an error begins with.
        options: of the file system.

    Raises:
        ConfigError: no store is behind it, or its library is not installed.
    """
    protocol = url.partition("://")[0]
    if protocol in ("http", "https"):
        raise ConfigError(
            f"{config_field}: got {url!r}, expected a directory, a hub id, or a URL of a store "
            "that lists its files (gs://, s3://, hf://); a page of the hub is named "
            "organization/name"
        )
    try:
        system, root = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        library = _LIBRARIES.get(protocol)
        fix = f"pip install {library}" if library else reason(error)
        raise ConfigError(
            f"{config_field}: got {url!r}, expected the library that reads {protocol}://, which is "
            f"not installed; {fix}"
        ) from error
    except Exception as error:
        raise ConfigError(
            f"{config_field}: got {url!r}, expected a URL that fsspec opens, such as gs://, s3:// "
            f"or hf:// ({reason(error)})"
        ) from error
    return system, root.rstrip("/")


def reason(error: Exception) -> str:
    """Write what a store's library says in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
