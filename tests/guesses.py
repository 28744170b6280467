"""Guesses for the models without arithmetic, of which some are right: what a prefix says next is a function of it."""

from __future__ import annotations

import zlib


class Guessing:
    """Guesses ``most`` tokens, or as many as fit: of these so many are right as the prefix has it, the next is not.

    ``right``: how many were, in all; ``wrong``: those that were not. ``sizes``: tokens of the steps.
    """

    def __init__(self, most, vocab):
        self._most = most
        self._vocab = vocab
        self.right = self.wrong = 0
        self.sizes = []

    def of(self, requests):
        return [self._guess(r) for r in requests]

    def _guess(self, request):
        most = min(self._most, len(request.ids) - request.length - 1)
        if not request.guessable or most < 1:
            return ()
        state, guess = 0, []
        for token in request.ids[: request.length].tolist():
            state = zlib.crc32(token.to_bytes(4, "little"), state)
        right = state // self._vocab % (most + 1)
        for i in range(most):
            guess.append((state + (i >= right)) % self._vocab)
            state = zlib.crc32(guess[-1].to_bytes(4, "little"), state)
        return tuple(guess)

    def ended(self, request):
        pass

    def forget(self):
        pass

    def took(self, tokens, seconds):
        self.sizes.append(tokens)

    def verified(self, request, guessed, right):
        request.guessed.steps += 1
        request.guessed.drafted += guessed
        request.guessed.accepted += right
        self.right += right
        self.wrong += guessed - right
