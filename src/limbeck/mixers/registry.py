"""The mixers by name, as recipes and configurations call them."""

from limbeck.errors import LimbeckError, unknown
from limbeck.mixers.base import Mixer

_MIXERS: dict[str, type[Mixer]] = {}


def register_mixer(name: str, cls: type[Mixer]) -> None:
    """Make a mixer known by name, so that ``convert(mixer=name)`` and recipes can use it.

    Registering the same class again is allowed; `limbeck.testing.check_mixer` says whether it keeps the promises.

    Args:
        name: How recipes and configurations call it, such as ``"discrete-mamba2"``.
        cls: A subclass of `Mixer`.

    Raises:
        LimbeckError: When the name is taken by another class, or `cls` is not a mixer.
    """
    if not (isinstance(cls, type) and issubclass(cls, Mixer)):
        raise LimbeckError(f"{cls!r} is not a mixer", expected="a subclass of limbeck.mixers.Mixer")
    if _MIXERS.get(name, cls) is not cls:
        raise LimbeckError(
            f"the mixer name {name!r} is taken by {_MIXERS[name].__name__}",
            expected="a name of its own",
            hint=f"register {cls.__name__} under another name",
        )
    _MIXERS[name] = cls


def get_mixer(name: str) -> type[Mixer]:
    """Find a mixer class.

    Args:
        name: A registered name.

    Raises:
        LimbeckError: When there is none; the message lists those there are.
    """
    if name not in _MIXERS:
        raise unknown("mixer", name, _MIXERS, hint="limbeck.register_mixer(name, cls) adds one")
    return _MIXERS[name]


def mixer_names() -> tuple[str, ...]:
    """All registered names, sorted."""
    return tuple(sorted(_MIXERS))
