"""The cache of a student: a recurrent state where a mixer stands, keys and values where attention still does."""

from typing import Any, NoReturn

from torch import Tensor
from transformers import Cache, DynamicCache, PretrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from limbeck.errors import LimbeckError
from limbeck.mixers import MixerState


class RecurrentLayer(CacheLayerMixin):
    """The state of one mixer, and how many tokens went into it (padding included, as attention layers count).

    Attributes:
        state: The mixer's state, or None before the first token. Its tensors have the batch first.
        tokens: How many tokens went in.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self):
        super().__init__()
        self.state: MixerState | None = None
        self.tokens = 0

    def advance(self, state: MixerState, tokens: int) -> None:
        """Take the state after `tokens` more tokens."""
        self.state = state
        self.tokens += tokens

    def get_seq_length(self) -> int:
        """How many tokens went in."""
        return self.tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the attention mask, as a layer that kept every token would give them."""
        return self.tokens + query_length, 0

    def get_max_length(self) -> int:
        """There is no longest sequence."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.state, self.tokens = None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row j becomes what row ``beam_idx[j]`` was."""
        self._map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times, in place."""
        self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows only."""
        self._map(lambda tensor: tensor[indices.to(tensor.device)])

    def _map(self, fn: Any) -> None:
        if self.state is not None:
            self.state = self.state._make(fn(tensor) for tensor in self.state)

    def crop(self, tokens_to_remove: int) -> NoReturn:
        """A recurrent state cannot go back: always an error."""
        raise uncroppable()

    def offload(self) -> None:
        """Nothing to do: the state stays where it is, it is small."""

    def prefetch(self) -> None:
        """Nothing to do: the state stays where it is, it is small."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> NoReturn:
        """There are no keys and values here."""
        raise AssertionError("a recurrent layer holds no keys and values")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> NoReturn:
        """There are no keys and values here."""
        raise AssertionError("a recurrent layer holds no keys and values")


class StudentCache(DynamicCache):
    """A `DynamicCache` with recurrent layers at the student's swapped layers.

    `generate` and ``use_cache=True`` make one by themselves; make one yourself to go on from it over several calls.

    Args:
        config: The student's configuration.
    """

    def __init__(self, config: PretrainedConfig):
        super().__init__(config=config)
        for index in getattr(config, "swapped_layers", ()):
            self.layers[index] = RecurrentLayer()

    def reset(self) -> None:
        """Forget everything, as if new."""
        super().reset()
        for layer in self.layers:
            if isinstance(layer, DynamicLayer):  # before transformers 5.23 these only become zero and keep their length
                layer.keys = layer.values = None
                layer.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens: possible only where no layer is recurrent.

        Raises:
            LimbeckError: When a layer is; nothing has been removed then.
        """
        if any(isinstance(layer, RecurrentLayer) for layer in self.layers):
            raise uncroppable()
        super().crop(tokens_to_remove)


def cache_bytes(cache: Cache) -> int:
    """How much memory a cache holds: of a student's or a teacher's layers, whatever they keep of each tensor alive.

    Args:
        cache: As a forward pass or `generate` returned it.
    """
    held: dict[int, int] = {}
    layers: Any = cache.layers
    for layer in layers:
        tensors = layer.state if isinstance(layer, RecurrentLayer) else (layer.keys, layer.values)
        for tensor in tensors or ():
            if tensor is not None:
                storage = tensor.untyped_storage()  # all of it: a view keeps the whole alive
                held[storage.data_ptr()] = storage.nbytes()
    return sum(held.values())


def uncroppable() -> LimbeckError:
    """The error for whoever wants to take tokens back out of a recurrent state."""
    return LimbeckError(
        "a student's cache was asked to drop tokens it has seen",
        expected="tokens to be added only: a recurrent state cannot be cropped",
        hint="keep copy.deepcopy(cache) of the point to go back to",
    )


def check_cache(cache: Any) -> None:
    """Refuse a cache that has no room for recurrent states.

    Args:
        cache: What was given.

    Raises:
        LimbeckError: When it is not a `StudentCache`.
    """
    if not isinstance(cache, StudentCache):
        raise LimbeckError(
            f"a student was given a {type(cache).__name__} as its cache",
            expected="a StudentCache, with room for the states of its mixers (static and quantised caches have none)",
            hint="leave it out, or pass limbeck.students.StudentCache(model.config)",
        )
