"""The demo's text: Python's standard library, split by file, and a tokenizer trained on it."""

import json
from collections.abc import Iterable
from typing import Literal

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from limbeck.data import read_documents, split_by_file, standard_library_files, tokenize_to_file
from limbeck.demo.folder import Folder
from limbeck.files import replacing_folder, write_text
from limbeck.progress import say
from limbeck.students import load_tokenizer

VOCABULARY = 512
END_OF_TEXT = "<|endoftext|>"


def write_corpus(folder: Folder, seed: int) -> None:
    """Split the standard library by file, train the tokenizer on one part, and encode both."""
    tokenizer_folder = folder.path / "tokenizer"
    parts: tuple[Literal["training", "held-out"], ...] = ("training", "held-out")
    files = split_by_file(standard_library_files(), held_out_fraction=0.1, seed=seed)
    for part, chosen in zip(parts, files, strict=True):
        if not folder.corpus(part).exists():
            folder.corpus(part).parent.mkdir(exist_ok=True)
            texts = (file.read_text(encoding="utf-8", errors="replace") for file in chosen)
            write_text(folder.corpus(part), "".join(json.dumps({"text": text}) + "\n" for text in texts if text))
    if not tokenizer_folder.exists():
        say("training a byte-level BPE on the standard library's source")
        tokenizer = train_tokenizer(read_documents(folder.corpus("training")))
        with replacing_folder(tokenizer_folder) as work:
            tokenizer.save_pretrained(work)
    tokenizer = load_tokenizer(tokenizer_folder)
    for part in parts:
        path = folder.path / "corpus" / f"{part}.npy"
        if not path.exists():
            documents = read_documents(folder.corpus(part))
            tokenize_to_file(path, tokenizer, documents, tokenizer.eos_token_id, vocab_size=VOCABULARY)


def train_tokenizer(documents: Iterable[str], vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(map(str, documents), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT)
