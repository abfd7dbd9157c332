"""Datasets of token rows with document boundaries, and batches of them."""

from distillkit.data.collate import collate as collate
from distillkit.data.dataset import build_dataset as build_dataset
from distillkit.data.dataset import build_datasets as build_datasets
from distillkit.data.dataset import text_to_ids_hash as text_to_ids_hash
from distillkit.data.dataset import tokenizer_hash as tokenizer_hash
