"""From a teacher to a captured dataset, and from one captured dataset to another."""
