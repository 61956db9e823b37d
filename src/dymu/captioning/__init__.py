"""One prompt over many images, into a file that grows row by row."""

from dymu.captioning.file import CaptionFile, Header, Row
from dymu.captioning.run import Captioner, caption
from dymu.captioning.sources import Source, sources_in

__all__ = ["CaptionFile", "Captioner", "Header", "Row", "Source", "caption", "sources_in"]
