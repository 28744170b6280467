"""The cache core: a prefix cache for any mix of attention kinds, over any tiers. NumPy and the standard library only.

cache = RadixCache([full("full")], page_size=16, capacity={("full", Tier.DEVICE): 65536})
hit   = cache.match(key[:-1])          # how far is it cached
lease = cache.open(hit)                # pin what resuming there needs
cache.grow(lease, n)                   # slots for the next step
cache.commit(lease, key)               # computed pages become shareable
cache.close(lease)                     # finished, aborted, retracted
"""

from rootcellar.cache.choose import CORE, Hit, Lease, RadixCache, Suffixes, digests
from rootcellar.cache.control import Prefetch
from rootcellar.cache.explain import Explanation
from rootcellar.cache.journal import AllBlocksCleared, BlockRemoved, BlockStored, Eviction, KVEvent
from rootcellar.cache.key import Key
from rootcellar.cache.kind import Kind, Tier, chunked_local, full, recurrent, sliding_window
from rootcellar.cache.lease import ReqToTokenPool
from rootcellar.cache.moves import Answer, Done, Event, Failed, Found, Lost, Manifest, Move, Part, Question, Reports
from rootcellar.cache.order import LATEST, NEVER
from rootcellar.cache.slots import SlotAllocator
from rootcellar.cache.stats import CacheStats, ShelfStats
from rootcellar.cache.suffixes import owner_of
from rootcellar.cache.views import NodeView, TreeView

__all__ = [
    "CORE",
    "LATEST",
    "NEVER",
    "AllBlocksCleared",
    "Answer",
    "BlockRemoved",
    "BlockStored",
    "CacheStats",
    "Done",
    "Event",
    "Eviction",
    "Explanation",
    "Failed",
    "Found",
    "Hit",
    "KVEvent",
    "Key",
    "Kind",
    "Lease",
    "Lost",
    "Manifest",
    "Move",
    "NodeView",
    "Part",
    "Prefetch",
    "Question",
    "RadixCache",
    "Reports",
    "ReqToTokenPool",
    "ShelfStats",
    "SlotAllocator",
    "Suffixes",
    "Tier",
    "TreeView",
    "chunked_local",
    "digests",
    "full",
    "owner_of",
    "recurrent",
    "sliding_window",
]
