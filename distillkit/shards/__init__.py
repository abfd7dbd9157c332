"""A captured dataset on disk: its shards and its manifest."""
