"""Whether two models read the same tokens: only then are their figures comparable."""

from typing import Any

from limbeck.errors import LimbeckError

PROBE = "The still's limbeck: 1,024 drops—slowly, naïve façade;\n\n    for i in range(10): x[i] = 'Ω'"


def check_tokenizers(student: Any, teacher: Any, student_name: str, teacher_name: str) -> None:
    """Refuse two tokenizers that do not make the same tokens of a text.

    One may know tokens that the other does not, such as one for padding.

    Args:
        student: A tokenizer of transformers, as is `teacher`.
        teacher: The other.
        student_name: Whose it is, for the message.
        teacher_name: Whose it is.

    Raises:
        LimbeckError: A token has two ids, or a sentence is cut in two ways.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    clashes = sorted(token for token in ours.keys() & theirs.keys() if ours[token] != theirs[token])
    if clashes:
        token = clashes[0]
        what = f"token {token!r} is {ours[token]} for one and {theirs[token]} for the other ({len(clashes)} such)"
    elif (a := student(PROBE)["input_ids"]) != (b := teacher(PROBE)["input_ids"]):
        what = f"one makes {len(a)} tokens of a sentence, the other {len(b)}, or others"
    else:
        return
    raise LimbeckError(
        f"the tokenizers of {student_name} and {teacher_name} differ: {what}",
        expected="a student that reads its teacher's tokens",
        hint="name the teacher that it was made from, or one tokenizer for both (--tokenizer)",
    )
