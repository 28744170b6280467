"""What the server shows of itself: metrics, the radix tree, a trace, a live feed and the page that draws them."""

from rootcellar.server.observe.observer import Observer

__all__ = ["Observer"]
