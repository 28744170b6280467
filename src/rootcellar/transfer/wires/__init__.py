"""Ways for bytes from one node to another, one file each. ``tcp`` is the connection on which two nodes talk, too."""

from __future__ import annotations

from rootcellar.errors import ConfigError
from rootcellar.transfer.wires.wire import PageWire

WIRES = ("tcp", "mooncake", "nixl", "jax")
"""Those there are, as ``disaggregation_transfer_backend`` names them."""

_ANYWHERE = ("", "0.0.0.0", "::")


def open_wire(name: str, host: str, nbytes: int) -> PageWire | None:
    """The end of a wire on this node, which listens on ``host``; None for ``tcp``, whose bytes follow what is said.

    ``nbytes``: what can be under way at once. Raises ``ConfigError``: its library is not there, or cannot listen.
    """
    if name != "tcp" and host in _ANYWHERE:
        raise ConfigError(
            f"disaggregation_transfer_backend={name!r} tells others its address: disaggregation_host={host!r} is none "
            "that they could reach"
        )
    try:
        match name:
            case "mooncake":
                from rootcellar.transfer.wires.mooncake import MooncakeWire

                return MooncakeWire(host, nbytes)
            case "nixl":
                from rootcellar.transfer.wires.nixl import NixlWire

                return NixlWire(host, nbytes)
            case "jax":
                from rootcellar.transfer.wires.jax import JaxWire

                return JaxWire(host, nbytes)
            case _:
                return None
    except ConfigError as error:
        raise ConfigError(f"disaggregation_transfer_backend={name!r} cannot be used: {error}") from None
