"""From `data.source` to the object that yields documents."""

from moe.train.data.config import HUB_PREFIX, DataConfig
from moe.train.data.documents import Source
from moe.train.data.file_source import FileSource
from moe.train.data.hub_source import HubSource, StreamSource
from moe.train.data.stdlib_source import StdlibSource


def open_source(config: DataConfig) -> Source:
    """The source that the configuration names; errors about missing data come when it is read."""
    if config.source == "stdlib":
        return StdlibSource()
    if config.source.startswith(HUB_PREFIX):
        kind = StreamSource if config.streaming else HubSource
        return kind(config.source.removeprefix(HUB_PREFIX), config.hub_config, config.split, config.text_column)
    return FileSource(config.source, config.text_column)
