"""Shared fixtures: every test starts from its own seed and leaves no state behind."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported: its interpreter runs the kernels

hypothesis.settings.register_profile("limbeck", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("limbeck")


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


SENTENCES = (
    "the old word for a still is limbeck",
    "a vessel to distil spirits in, of copper or of glass",
    "what is poured in at the top comes out clearer at the side",
    "slowly, drop by drop, and the fire is kept low",
)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """A file of text with some order in it, for runs of a few hundred tokens."""
    path = tmp_path_factory.mktemp("text") / "still.txt"
    path.write_text("\n".join(f"{number}. {SENTENCES[number * 7 % 4]}" for number in range(300)))
    return path


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory):
    """A tiny random GPT-NeoX of two layers with a tokenizer of its own, as a checkpoint."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, GPTNeoXConfig, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=288, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(SENTENCES, trainer)
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=288,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.2,
    )
    folder = tmp_path_factory.mktemp("checkpoints") / "teacher"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>", bos_token="<end>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def student_folder(teacher_folder, tmp_path_factory):
    """That teacher's student, as converted."""
    import limbeck

    folder = tmp_path_factory.mktemp("student") / "student"
    limbeck.convert_folder(teacher_folder, folder)
    return folder


@pytest.fixture
def command(monkeypatch, capfd):
    """``limbeck ARGUMENTS`` in this process: exit code, standard output, standard error."""
    import limbeck_cli

    def command(*arguments):
        monkeypatch.setattr("sys.argv", ["limbeck", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            limbeck_cli.main()
        out, err = capfd.readouterr()
        return end.value.code or 0, out, err

    return command
