"""Token mixers of the student, one folder each."""
