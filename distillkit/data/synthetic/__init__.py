"""Text that asks for what stood long before, made from ordinary text."""

from distillkit.data.synthetic.facts import QuestionsAboutFacts as QuestionsAboutFacts
from distillkit.data.synthetic.files import count_tokens as count_tokens
from distillkit.data.synthetic.files import tokenize_documents as tokenize_documents
from distillkit.data.synthetic.files import write_documents as write_documents
from distillkit.data.synthetic.files import write_parts as write_parts
from distillkit.data.synthetic.passages import RepeatedPassages as RepeatedPassages
from distillkit.data.synthetic.passages import numbered_entries as numbered_entries
from distillkit.data.synthetic.rewriting import rewrite_documents as rewrite_documents
from distillkit.data.synthetic.synthesize import synthesize as synthesize
