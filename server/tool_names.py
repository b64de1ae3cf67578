"""Functions' names as a request has them, and as its model reads and writes them."""

from collections.abc import Callable, Iterable
from itertools import count
from typing import TypeVar

from server.tool_format import ShownCall, ShownTool, Turn

MAX_STEM = 48  # characters kept of a name that has to be another one

Named = TypeVar("Named", ShownTool, ShownCall)


class ToolNames:
    """The names of one request, each with the one that its model knows the function by.

    That is the same name wherever the model's format carries it (`ToolFormat.carries`), else one like it. No two names
    are known as one, and the same names in the same order are always known by the same ones.
    """

    def __init__(self, names: Iterable[str], carries: Callable[[str], bool]) -> None:
        given = dict.fromkeys(names)
        self._shown = {name: name for name in given if carries(name)}
        self._meant = dict(self._shown)
        for name in given:
            if name not in self._shown:
                self._shown[name] = shown = self._like(name, carries)
                self._meant[shown] = name

    def _like(self, name: str, carries: Callable[[str], bool]) -> str:
        stem = "".join(char if carries(char) else "_" for char in name[:MAX_STEM])
        return next(other for n in count(1) if (other := f"{stem}_{n}") not in self._meant)

    def shown(self, name: str) -> str:
        """What the model is shown for one of the names."""
        return self._shown[name]

    def meant(self, name: str) -> str:
        """Which function the model means; a name that it made up is left as it is."""
        return self._meant.get(name, name)

    def in_tool(self, tool: Named) -> Named:
        """A definition for a template, with the name that the model is shown."""
        renamed = tool.copy()
        renamed["function"] = tool["function"].copy()
        renamed["function"]["name"] = self._known(tool["function"]["name"])
        return renamed

    def in_turn(self, turn: Turn) -> Turn:
        """A message for a template, with the names that the model is shown in its calls, or of the call it answers."""
        if "tool_calls" in turn:
            return {**turn, "tool_calls": [self.in_tool(call) for call in turn["tool_calls"]]}
        if turn["role"] == "tool" and "name" in turn:
            return {**turn, "name": self._known(turn["name"])}
        return turn

    def _known(self, name: str) -> str:
        return self._shown.get(name, name)
