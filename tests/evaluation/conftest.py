"""What tests of evaluations share."""

import pytest

import limbeck


@pytest.fixture(scope="session")
def student_folder(teacher_folder, tmp_path_factory):
    """A hybrid student of that teacher, attention in its first layer."""
    folder = tmp_path_factory.mktemp("student") / "student"
    limbeck.convert_folder(teacher_folder, folder, keep_attention=[0])
    return folder
