"""Guesses of which some are right: for the models without arithmetic, and of answers that are known."""

from __future__ import annotations

import zlib


class Guessing:
    """For models without arithmetic, of which what comes next is a function of the prefix.

    Guesses ``most`` tokens, or as many as fit: of these so many are right as the prefix has it, the next is not.

    With ``unguessed`` requests nothing is worth it.
    ``right``: how many were, in all; ``wrong``: those that were not. ``sizes``: tokens of the steps.
    """

    def __init__(self, most, vocab, unguessed=0):
        self._most = most
        self._unguessed = unguessed
        self._vocab = vocab
        self.right = self.wrong = 0
        self.sizes = []

    def worth_waiting(self, requests):
        return len(requests) != self._unguessed

    def of(self, requests):
        return [self._guess(r) if self.worth_waiting(requests) else () for r in requests]

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

    def took(self, tokens, seconds, *, ahead=False):
        self.sizes.append(tokens)

    def verified(self, request, guessed, right):
        request.guessed.steps += 1
        request.guessed.drafted += guessed
        request.guessed.accepted += right
        self.right += right
        self.wrong += guessed - right


class Knowing:
    """Knows what requests will say, by their prompts (``answers``), and says it up to a token here and there.

    ``rows``: tokens of the largest step.
    """

    def __init__(self, rows):
        self._rows = rows
        self.answers = {}
        self.guessed = self.right = self.compiled = 0

    def worth_waiting(self, requests):
        return True

    def of(self, requests):
        return [self._guess(r, self._rows // len(requests) - 1) for r in requests]

    def _guess(self, request, most):
        known = self.answers.get(tuple(request.ids[: request.prompt_length].tolist()), ())[request.generated :]
        state = zlib.crc32(bytes(str(known), "ascii"))
        guess = list(known[: max(0, min(most, len(request.ids) - request.length - 1))])
        if guess and state % 3 == 0:
            at = state // 3 % len(guess)
            guess = [*guess[:at], (guess[at] + 1) % 500, *guess[at + 1 :]]
        return tuple(guess) if request.guessable else ()

    def ended(self, request):
        pass

    def forget(self):
        pass

    def took(self, tokens, seconds, *, ahead=False):
        pass

    def verified(self, request, guessed, right):
        request.guessed.steps += 1
        request.guessed.drafted += guessed
        request.guessed.accepted += right
        self.guessed += guessed
        self.right += right
