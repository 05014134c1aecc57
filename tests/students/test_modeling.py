"""Students are Hugging Face models in every respect; the laws of what they compute are in `test_table.py`."""

import copy
import inspect
import io
import pickle
import subprocess
import sys

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.modeling_flash_attention_utils import _flash_attention_forward

import limbeck
from limbeck.students import StudentCache, arguments, backbone, mixers, modeling, student_config, swapped_layers

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def greedy(model, input_ids, **options):
    return model.generate(input_ids, max_new_tokens=10, do_sample=False, eos_token_id=None, **options)


# --- the same sequence, whole and in pieces ---------------------------------------------------------------------------


def test_chunked_prefill(make_student, family, keep, tokens):
    student = make_student(family, keep)
    assert torch.equal(greedy(student, tokens, prefill_chunk_size=5), greedy(student, tokens))


def test_generation_goes_on_from_a_returned_cache(make_student, family, keep, tokens):
    student = make_student(family, keep)
    whole = greedy(student, tokens)
    half = student.generate(tokens, max_new_tokens=4, do_sample=False, eos_token_id=None, return_dict_in_generate=True)
    rest = student.generate(
        half.sequences,
        past_key_values=half.past_key_values,
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=None,
        attention_mask=torch.ones_like(half.sequences),
    )
    assert torch.equal(rest, whole)


def test_output_does_not_look_ahead(make_student, family, keep, tokens):
    student, changed = make_student(family, keep), tokens.clone()
    changed[:, 7:] = 3
    torch.testing.assert_close(student(changed).logits[:, :7], student(tokens).logits[:, :7], **CLOSE)


# --- padding ----------------------------------------------------------------------------------------------------------


def left_padded(tokens, lengths):
    mask = torch.zeros_like(tokens)
    for row, length in zip(mask, lengths, strict=True):
        row[-length:] = 1
    return tokens.where(mask.bool(), 2), mask


def test_padded_prompts_generate_as_if_alone(make_student, family, keep, tokens):
    student = make_student(family, keep)
    padded, mask = left_padded(tokens, (5, 12))
    together = greedy(student, padded, attention_mask=mask)[:, 12:]
    for row, length in enumerate((5, 12)):
        assert torch.equal(greedy(student, tokens[row : row + 1, -length:])[0, length:], together[row])


# --- packed documents -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("told_by", ["seq_idx", "position_ids"])
def test_packed_documents_are_separate_documents(make_student, family, keep, tokens, told_by):
    student = make_student(family, keep)
    seq_idx = torch.tensor([0] * 4 + [1] * 7 + [2]).expand(2, -1)
    told = {"seq_idx": seq_idx, "position_ids": arguments.positions_in_documents(seq_idx)}
    logits = student(tokens, use_cache=False, **{told_by: told[told_by]}).logits
    alone = torch.cat([student(piece).logits for piece in tokens.split([4, 7, 1], dim=1)], dim=1)
    torch.testing.assert_close(logits, alone, **CLOSE)
    assert not torch.allclose(student(tokens).logits, alone, rtol=1e-3, atol=1e-3)


def test_packed_documents_with_a_mask_of_ones(make_student, family, tokens):
    student = make_student(family, (1,))
    seq_idx = torch.tensor([0] * 4 + [1] * 8).expand(2, -1)
    with_mask = student(tokens, seq_idx=seq_idx, attention_mask=torch.ones_like(tokens)).logits
    assert torch.equal(with_mask, student(tokens, seq_idx=seq_idx).logits)


def test_packed_documents_refuse_padding_and_caches(make_student, tokens):
    student, seq_idx = make_student("llama"), torch.zeros(2, 12, dtype=torch.long)
    _, mask = left_padded(tokens, (5, 12))
    with pytest.raises(limbeck.LimbeckError, match="seq_idx together with padding"):
        student(tokens, seq_idx=seq_idx, attention_mask=mask)
    with pytest.raises(limbeck.LimbeckError, match="seq_idx together with a cache"):
        student(tokens, seq_idx=seq_idx, past_key_values=StudentCache(student.config))


# --- a Hugging Face model in every respect ----------------------------------------------------------------------------


def test_a_backbone_is_loaded_from_a_language_model(make_student, family, keep, tokens, tmp_path):
    student = make_student(family, keep)
    student.save_pretrained(tmp_path)
    body = AutoModel.from_pretrained(tmp_path)
    assert body.config.swapped_layers == [i for i in range(3) if i not in keep]
    assert torch.equal(body(tokens)[0], backbone(student)(tokens)[0])


def test_copies_and_pickles(make_student, family, tokens):
    student = make_student(family, (1,))
    logits = student(tokens).logits
    assert torch.equal(copy.deepcopy(student)(tokens).logits, logits)
    assert torch.equal(pickle.loads(pickle.dumps(student))(tokens).logits, logits)  # noqa: S301
    assert pickle.loads(pickle.dumps(student.config)).to_dict() == student.config.to_dict()  # noqa: S301
    buffer = io.BytesIO()
    torch.save(student.state_dict(), buffer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_random_student_from_a_configuration(make_teacher, family, tokens, dtype):
    config = student_config(make_teacher(family).config, keep_attention=[1])
    student = AutoModelForCausalLM.from_config(config, dtype=dtype)
    assert swapped_layers(student) == (0, 2)
    assert student(tokens).logits.isfinite().all()
    for mixer in mixers(student).values():
        assert mixer.D.dtype == torch.float32
        assert mixer.in_proj.weight.dtype == dtype
        assert mixer.D.eq(1).all()
        assert mixer.conv1d.weight[..., -1].eq(1).all()


def test_bfloat16_keeps_what_must_be_float32(make_student, family, tokens, tmp_path):
    student = make_student(family, (1,), dtype=torch.bfloat16)
    student.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    narrowed = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).to(torch.bfloat16)
    for model in (student, again, narrowed):
        assert {mixer.D.dtype for mixer in mixers(model).values()} == {torch.float32}
        assert {mixer.in_proj.weight.dtype for mixer in mixers(model).values()} == {torch.bfloat16}
    assert torch.equal(again(tokens).logits, student(tokens).logits)
    cache = again(tokens, use_cache=True).past_key_values
    assert cache.layers[0].state.recurrent.dtype == torch.float32


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(make_student, family, tokens, reentrant):
    student = make_student(family, (1,)).train()
    padded, mask = left_padded(tokens, (5, 12))

    def gradients():
        student.zero_grad()
        student(padded, attention_mask=mask, labels=padded).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in student.named_parameters()}

    plain = gradients()
    assert all(gradient.ne(0).any() for gradient in plain.values())
    enable = getattr(student, "activation_checkpointing_enable", student.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})
    if reentrant:
        student.enable_input_require_grads()
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-4, atol=1e-6, msg=name)


def test_recorded_outputs(make_student, family, tokens):
    student = make_student(family, (1,))
    student.set_attn_implementation("eager")
    output = student(tokens, output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 4
    assert [tuple(weights.shape) for weights in output.attentions] == [(2, 4, 12, 12)]  # swapped layers record none


def test_kept_attention_ignores_the_mixers_keywords(make_student, family, tokens):
    student = make_student(family, (0, 2))
    padded, mask = left_padded(tokens, (5, 12))
    sdpa = student(padded, attention_mask=mask).logits
    student.set_attn_implementation("eager")
    real = mask.bool()
    torch.testing.assert_close(student(padded, attention_mask=mask).logits[real], sdpa[real], **CLOSE)
    for function in (flash_attention_forward, _flash_attention_forward):  # cannot run here: do they take any keyword?
        parameters = inspect.signature(function).parameters
        assert arguments.PADDING not in parameters
        assert any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())


def test_arguments_may_be_positional(make_student, family, tokens):
    student = make_student(family, (1,))
    padded, mask = left_padded(tokens, (5, 12))
    given = {"input_ids": padded, "attention_mask": mask}
    by_name = backbone(student)(**given)[0]
    signature = inspect.signature(type(backbone(student)).forward)
    names = list(signature.parameters)[1:]
    positional = [given.get(name) for name in names[: names.index("attention_mask") + 1]]
    assert torch.equal(backbone(student)(*positional)[0], by_name)
    assert signature == inspect.signature(type(backbone(student)).__bases__[1].forward)


def test_inputs_embeds(make_student, family, tokens):
    student = make_student(family, (1,))
    embeddings = student.get_input_embeddings()(tokens)
    assert torch.equal(student(inputs_embeds=embeddings).logits, student(tokens).logits)


def test_a_mask_that_is_not_one_of_padding_is_refused(make_student, tokens):
    with pytest.raises(limbeck.LimbeckError, match="seq_idx"):
        make_student("llama")(tokens, attention_mask=torch.ones(2, 1, 12, 12))


def test_a_configuration_with_impossible_layers_is_refused(make_teacher):
    config = student_config(make_teacher("phi").config).to_dict()
    with pytest.raises(limbeck.LimbeckError, match="swapped_layers"):
        modeling.LimbeckPhiConfig(**(config | {"swapped_layers": [0, 3]}))


@pytest.mark.slow
def test_a_fresh_process_needs_only_the_import(make_student, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "<eos>": 1, "<pad>": 2} | {f"w{i}": i for i in range(3, 61)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>").save_pretrained(tmp_path)
    make_student("gpt_neox", (1,)).save_pretrained(tmp_path)
    script = (
        "import sys, limbeck\n"
        "from transformers import pipeline\n"
        "out = pipeline('text-generation', model=sys.argv[1])(['w3 w4', 'w5'], max_new_tokens=4, batch_size=2)\n"
        "print(len(out), out[0][0]['generated_text'])"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2 w3 w4")
