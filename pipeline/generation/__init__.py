"""From captions to image tokens to pictures."""
