"""OpenAI's responses: answers that may go on from one that was kept."""
