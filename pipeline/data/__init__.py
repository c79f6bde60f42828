"""What a run reads: shards, captions as tokens, images, and which sample comes when."""
