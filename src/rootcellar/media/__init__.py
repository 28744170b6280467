"""Pictures: from what a caller gives (bytes, data URLs, files, addresses, PIL images, arrays) to pixels, within limits.

What is read here was written by nobody whom the engine trusts, so all of it is counted before it is decoded. The server
has it read in a process of its own (``reader.py``, ``worker.py``).
"""

from rootcellar.media.limits import MediaLimits
from rootcellar.media.picture import Picture
from rootcellar.media.reading import read, read_all

__all__ = ["MediaLimits", "Picture", "read", "read_all"]
