"""What a run would cost, said before it starts: parameters, tokens, memory, disk, time, and what is doubtful."""
