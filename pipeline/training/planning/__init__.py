"""What a run will take of memory, time and network, said before it starts."""
