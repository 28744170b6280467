"""Peers: pages of the KV cache, by name, from the node that computes prompts to the one that answers.

    prefill node                                            decode node
    ┌───────────────────────────────┐   GET /route    ┌───────────────────────────────┐
    │ Bootstrap    who may be asked │ ◀────────────── │ Receiver: a thread for a room │
    │ Sender:      a thread for a   │     HELLO       │                               │
    │              room, and what   │ ◀────────────── │ joins the room,               │
    │              it was offered   │     WELCOME     │                               │
    │ offer(manifest) as chunks are │ ──────────────▶ │ asks for what it lacks,       │
    │ committed                     │     WANT        │                               │
    │ reads pages from the device,  │ ◀────────────── │ takes pages into host memory  │
    │ sends them                    │     PAGES       │ as they come                  │
    │ lets go of what arrived       │ ──────────────▶ │                               │
    │                               │   ACK, DONE     │                               │
    └───────────────────────────────┘ ◀────────────── └───────────────────────────────┘

By ``tcp`` pages follow where they are said; by other wires (``wires/``) they are lent, said where, and fetched.

A *room* (SGLang's ``bootstrap_room``) is where the two requests for one prompt meet. Whoever is first waits in it.
"""
