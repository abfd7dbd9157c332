"""Pretrained models: loading, access to decoders and heads, vocabularies, attention over packed documents."""
