"""From prompts to answers: the engine knows tokens, the session knows text."""
