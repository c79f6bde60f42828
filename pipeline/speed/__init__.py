"""What the benches of this room measure; no entry points live here."""
