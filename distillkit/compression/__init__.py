"""What a teacher said, as few bytes, and back: the codecs of the published formats."""
