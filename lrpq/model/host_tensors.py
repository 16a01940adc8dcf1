"""Low memory: tensors of a GPU that wait in host memory for their turn, and are read as if they were on the device.

A reading gives a copy on the device, which is not kept there. Readings in the order in which the tensors were first put
find the next one on its way already.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, MutableMapping, MutableSequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic, TypeVar, overload

import torch
from torch import Tensor

from lrpq.model.host_copies import Fetched, HostCopies

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """One tensor on the host, or on its way there."""

    copies: HostCopies
    copy: Future[Tensor]
    shape: torch.Size
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor, copies: HostCopies) -> Waiting:
        """A tensor that must not be changed any more."""
        return cls(copies=copies, copy=copies.start(tensor), shape=tensor.shape, dtype=tensor.dtype)

    def fetch(self) -> Future[Fetched]:
        """Start to bring a copy to the device."""
        return self.copies.fetch(self.copy.result, shape=self.shape, dtype=self.dtype)

    def __call__(self) -> Tensor:
        """A copy on the device."""
        return self.copies.arrived(self.fetch())


def settled(tensor: Tensor, copies: HostCopies) -> Waiting:
    """On the host, when this returns: its memory on the device is not needed any more."""
    waiting = Waiting.of(tensor, copies)
    waiting.copy.result()
    return waiting


class HostTensors(MutableMapping[Key, Tensor], Generic[Key]):
    """Tensors by key."""

    def __init__(self, copies: HostCopies) -> None:
        self.copies = copies
        self._waiting: dict[Key, Waiting] = {}
        self._ahead: tuple[Key, Future[Fetched]] | None = None

    def __setitem__(self, key: Key, tensor: Tensor) -> None:
        if self._ahead is not None and self._ahead[0] == key:
            self._drop()
        self._waiting[key] = Waiting.of(tensor, self.copies)

    def __getitem__(self, key: Key) -> Tensor:
        waiting = self._waiting[key]
        if self._ahead is not None and self._ahead[0] != key:
            self._drop()
        fetched = waiting.fetch() if self._ahead is None else self._ahead[1]
        tensor = self.copies.arrived(fetched)
        following = self._after(key)
        self._ahead = None if following is None else (following, self._waiting[following].fetch())
        return tensor

    def __delitem__(self, key: Key) -> None:
        if self._ahead is not None and self._ahead[0] == key:
            self._drop()
        del self._waiting[key]

    def __iter__(self) -> Iterator[Key]:
        return iter(list(self._waiting))

    def __len__(self) -> int:
        return len(self._waiting)

    def _after(self, key: Key) -> Key | None:
        keys = iter(self._waiting)
        for found in keys:
            if found == key:
                return next(keys, None)
        raise KeyError(key)

    def _drop(self) -> None:
        """What comes early is not wanted; its memory may be given up when it has arrived."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            self.copies.arrived(ahead[1])

    def clear(self) -> None:
        """Forget all, without bringing any of them back."""
        self._drop()
        self._waiting.clear()


Name = TypeVar("Name", bound=Hashable)


class HostGroups(MutableMapping[Key, Mapping[Name, Tensor]], Generic[Key, Name]):
    """Some tensors by name for each key."""

    def __init__(self, copies: HostCopies) -> None:
        self._tensors: HostTensors[tuple[Key, Name]] = HostTensors(copies)
        self._names: dict[Key, tuple[Name, ...]] = {}

    def __setitem__(self, key: Key, group: Mapping[Name, Tensor]) -> None:
        for name in self._names.get(key, ()):
            if name not in group:
                del self._tensors[key, name]
        self._names[key] = tuple(group)
        for name, tensor in group.items():
            self._tensors[key, name] = tensor

    def __getitem__(self, key: Key) -> Mapping[Name, Tensor]:
        return {name: self._tensors[key, name] for name in self._names[key]}

    def __delitem__(self, key: Key) -> None:
        for name in self._names.pop(key):
            del self._tensors[key, name]

    def __iter__(self) -> Iterator[Key]:
        return iter(list(self._names))

    def __len__(self) -> int:
        return len(self._names)

    def clear(self) -> None:
        """Forget all, without bringing any of them back."""
        self._names.clear()
        self._tensors.clear()


class HostList(MutableSequence[Tensor]):
    """Tensors by number."""

    def __init__(self, tensors: Iterable[Tensor], copies: HostCopies) -> None:
        self._tensors: HostTensors[int] = HostTensors(copies)
        for tensor in tensors:
            self.append(tensor)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> MutableSequence[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | MutableSequence[Tensor]:
        if isinstance(index, slice):
            raise TypeError("tensors on the host are read one at a time")
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._tensors[index]

    def __setitem__(self, index: int | slice, tensor: Tensor | Iterable[Tensor]) -> None:
        if isinstance(index, slice) or not isinstance(tensor, Tensor):
            raise TypeError("tensors on the host are put one at a time")
        if not 0 <= index < len(self):
            raise IndexError(index)
        self._tensors[index] = tensor

    def __delitem__(self, index: int | slice) -> None:
        raise TypeError("a list of tensors on the host only grows")

    def __len__(self) -> int:
        return len(self._tensors)

    def insert(self, index: int, tensor: Tensor) -> None:
        """At the end."""
        if index != len(self):
            raise TypeError("a list of tensors on the host only grows at its end")
        self._tensors[index] = tensor


Hold = Callable[[Tensor], Callable[[], Tensor]]
"""From a tensor to what gives it again: where it waits meanwhile is the holder's business."""


def at_hand(tensor: Tensor) -> Callable[[], Tensor]:
    """Held where it is."""
    return lambda: tensor
