"""The cache of a student: a recurrent state where a mixer stands, keys and values where attention still does."""

from itertools import chain
from typing import Any, NoReturn

import torch
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


class FixedRecurrentLayer(RecurrentLayer):
    """A mixer's state at a fixed address: every token is written over it.

    Args:
        filled: The layer after a prompt; its tensors are taken over.
        position: See `FixedCache`.
        room: See `FixedCache`.
    """

    def __init__(self, filled: RecurrentLayer, position: Tensor, room: int):
        super().__init__()
        assert filled.state is not None
        state = filled.state._make(tensor.contiguous() for tensor in filled.state)
        if state.conv.device.type == "cpu":  # the channels last: what enters at a token then lies side by side
            state = state._replace(conv=state.conv.mT.contiguous().mT)
        self.state = state
        self.position, self.room = position, room

    def advance(self, state: MixerState, tokens: int) -> NoReturn:
        """States are written over, not handed in."""
        raise AssertionError("a fixed layer's state is written in place")

    def get_seq_length(self) -> Any:
        """How many tokens went in, as a tensor, which a graph can follow."""
        return self.position

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the attention mask, the same at every token."""
        return self.room, 0


class FixedAttentionLayer(CacheLayerMixin):
    """Keys and values with room for all tokens to come, at fixed addresses; windows are left to the mask.

    Args:
        filled: The layer after a prompt.
        position: See `FixedCache`.
        room: See `FixedCache`.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False

    def __init__(self, filled: DynamicLayer, position: Tensor, room: int):
        super().__init__()
        given: Any = (filled.keys, filled.values)
        self.keys, self.values = (self._spread(tensor, position, room) for tensor in given)
        self.position, self.room = position, room
        self.is_initialized = True

    @staticmethod
    def _spread(tensor: Tensor, position: Tensor, room: int) -> Tensor:
        """(b, h, kept, p) to (b, h, room, p), each token in its place: a sliding window kept the last ones only."""
        spread = tensor.new_zeros(*tensor.shape[:2], room, tensor.shape[3])
        end = int(position)
        spread[:, :, end - tensor.shape[2] : end] = tensor
        return spread

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Put one token, (b, h, 1, p), in its place, and return all."""
        assert self.keys is not None
        assert self.values is not None
        place = self.position.reshape(1)
        return self.keys.index_copy_(2, place, key_states), self.values.index_copy_(2, place, value_states)

    def get_seq_length(self) -> Any:
        """How many tokens went in, as a tensor, which a graph can follow."""
        return self.position

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the attention mask, the same at every token."""
        return self.room, 0

    def get_max_length(self) -> int:
        """All the room there is."""
        return self.room

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> NoReturn:
        """It is made full."""
        raise AssertionError("a fixed layer is made from a filled one")


class FixedCache(StudentCache):
    """A cache after its prompt, with every tensor at a fixed address, so that one token's work can be a CUDA graph.

    It takes one token a call, and none of them padding. The caller counts `position` up after each.

    Args:
        config: The student's or teacher's configuration.
        filled: The cache after the prompt; it is used up.
        tokens: The length of the prompt, padding included.
        room: How many tokens there may be at most, those of the prompt included.

    Attributes:
        position: () int64, how many tokens went in.
        attends: Whether there is attention, which needs a mask over all the room.
    """

    def __init__(self, config: PretrainedConfig, filled: Cache, tokens: int, room: int):
        super().__init__(config)
        layers: list[Any] = filled.layers
        recurrent = [isinstance(layer, RecurrentLayer) for layer in layers]
        first = layers[0].state.conv if recurrent[0] else layers[0].keys
        self.position = torch.tensor(tokens, device=first.device)
        self.attends = not all(recurrent)
        for index, of_mixer in enumerate(recurrent):  # one by one: the old keys and values go as the new ones come
            kind = FixedRecurrentLayer if of_mixer else FixedAttentionLayer
            self.layers[index] = kind(layers[index], self.position, room if self.attends else 1)
            layers[index] = None

    def tensors(self) -> list[Tensor]:
        """Every tensor that a token's work reads or changes, `position` first."""
        layers: list[Any] = self.layers
        pairs = ((x.state or ()) if isinstance(x, RecurrentLayer) else (x.keys, x.values) for x in layers)
        return [self.position, *chain.from_iterable(pairs)]


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
