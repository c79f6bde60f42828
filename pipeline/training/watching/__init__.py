"""What a run says of itself while it trains, and who looks whether it still does."""
