"""The student: the network that is saved (`network`), and the mixers that its layers may have (`mixers`)."""
