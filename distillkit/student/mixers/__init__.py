"""What the product knows of each mixer beside its module in the network (docs/adding_a_mixer.md)."""
