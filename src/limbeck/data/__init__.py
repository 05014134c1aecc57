"""Data: text into tokens, tokens into samples, samples into batches. It knows nothing of models."""

from limbeck.data.ahead import ReadAhead
from limbeck.data.batches import BatchSampler, collate, fitting_micro_batch, micro_batches, share_of
from limbeck.data.corpus import Corpus, Reading
from limbeck.data.megatron import PILE_SAMPLES, MegatronDataset, describe, is_megatron
from limbeck.data.megatron_writer import MegatronWriter
from limbeck.data.mixture import MixedDataset, mixed
from limbeck.data.open import open_samples, source_files
from limbeck.data.packing import TokenDataset, load_tokens, write_tokens
from limbeck.data.prepare import prepare
from limbeck.data.samples import Part, Samples, split_samples
from limbeck.data.stdlib import split_by_file, standard_library_files
from limbeck.data.tasks import Task, TaskDataset, read_tasks
from limbeck.data.text import Document, encode_batches, encode_documents, read_documents, text_files, tokenize_to_file

__all__ = [
    "PILE_SAMPLES",
    "BatchSampler",
    "Corpus",
    "Document",
    "MegatronDataset",
    "MegatronWriter",
    "MixedDataset",
    "Part",
    "ReadAhead",
    "Reading",
    "Samples",
    "Task",
    "TaskDataset",
    "TokenDataset",
    "collate",
    "describe",
    "encode_batches",
    "encode_documents",
    "fitting_micro_batch",
    "is_megatron",
    "load_tokens",
    "micro_batches",
    "mixed",
    "open_samples",
    "prepare",
    "read_documents",
    "read_tasks",
    "share_of",
    "source_files",
    "split_by_file",
    "split_samples",
    "standard_library_files",
    "text_files",
    "tokenize_to_file",
    "write_tokens",
]
