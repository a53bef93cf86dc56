"""The engines that can be asked for by name."""

from enum import StrEnum


class EngineChoice(StrEnum):
    """Which engine to use.

    `auto` and `dagger` both mean the first real engine that answers; only the
    name tells that nothing else would do.
    """

    AUTO = "auto"
    DAGGER = "dagger"
    EMBEDDED = "embedded"
