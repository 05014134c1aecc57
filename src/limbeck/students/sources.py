"""Where a checkpoint is: a folder, or a hub id whose files are fetched; and which of its files go along."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from limbeck.errors import LimbeckError
from limbeck.students.loading import WEIGHT_FILES, indexed, not_loaded

CARRIED = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "normalizer.json",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates/*",
    "LICENSE*",
    "NOTICE*",
)
"""Files of a checkpoint that are as true of the student as of the teacher."""


def carried_files(folder: Path) -> list[Path]:
    """The files of a checkpoint that go along as they are, relative to its folder."""
    found = {path for pattern in CARRIED for path in folder.glob(pattern) if path.is_file()}
    return sorted(path.relative_to(folder) for path in found)


def checkpoint_folder(source: str | Path) -> Path:
    """Find a checkpoint's folder; for a hub id, fetch what a conversion needs unless it is in the cache.

    Args:
        source: A folder or a hub id.

    Raises:
        LimbeckError: When the hub has no such checkpoint, or cannot be reached and the cache has none.
    """
    if Path(source).is_dir():
        return Path(source)
    try:
        folder = _fetched(source, "config.json", "*.index.json", *CARRIED)
        for name in WEIGHT_FILES:  # in the order transformers looks for them, and no more than it would take
            if not (folder / name).is_file():
                folder = _fetched(source, name)
            if (start := folder / name).is_file():
                if start.suffix == ".json":
                    _fetched(source, *(file.name for file in indexed(start)))
                break
    except (OSError, ValueError, HFValidationError) as error:
        if isinstance(error, LimbeckError):
            raise
        raise not_loaded("model", source, error) from error
    return folder


def _fetched(source: str | Path, *patterns: str) -> Path:
    return Path(snapshot_download(str(source), allow_patterns=list(patterns)))
