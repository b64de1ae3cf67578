"""Default sampling: as the model's generation_config.json recommends, or as in OpenAI's API."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, ValidationError

from batching.errors import ModelError
from server.fields import Body, Integral, Number
from server.replies import DefaultSampling

FILE = "generation_config.json"


class Defaults(Body):
    """OpenAI's defaults unless overridden. A file's `do_sample` is ignored, as in vLLM, and so is its length."""

    temperature: Annotated[Number, Field(ge=0)] = 1.0
    top_p: Annotated[Number, Field(ge=0, le=1)] = 1.0
    top_k: Annotated[int, Field(strict=True, ge=-1, lt=2**31), Integral, AfterValidator(lambda k: max(k, 0))] = 0
    min_p: Annotated[Number, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[Number, Field(gt=0, le=10)] = 1.0

    def as_reply(self) -> DefaultSampling:
        return {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
        }

    def __str__(self) -> str:
        """Temperature, top_p, and anything else that has an effect."""
        others = self.model_dump(include={"top_k", "min_p", "repetition_penalty"}, exclude_defaults=True)
        shown = {"temperature": self.temperature, "top_p": self.top_p} | others
        return ", ".join(f"{name} {value:g}" for name, value in shown.items())


DEMO = Defaults(temperature=0.2, top_p=0.5)
"""Lower than the top_p of 0.9 in SmolLM2-135M-Instruct's own examples: with that, every second answer to "What is the
capital of France?" begins with another token than "The" and rambles."""


def recommended(model: str | None) -> Defaults:
    """The defaults of a model: a folder, a .gguf file (from its folder) or a hub id; None is the demo model.

    Raises `ModelError` for invalid values.
    """
    if model is None:
        return DEMO
    path = Path(model).expanduser()
    if not path.exists():
        return _from_hub(model)
    file = (path if path.is_dir() else path.parent) / FILE
    return _checked(file.read_bytes(), str(file)) if file.is_file() else Defaults()


def _from_hub(model: str) -> Defaults:
    from transformers import GenerationConfig

    try:
        config = GenerationConfig.from_pretrained(model)
    except OSError:
        return Defaults()  # the repository has no such file
    return _checked(config.to_json_string(use_diff=False), f"{FILE} of {model}")


def _checked(text: bytes | str, place: str) -> Defaults:
    try:
        return Defaults.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = "".join(f"{part}: " for part in first["loc"])
        raise ModelError(
            f"{place} cannot be used: {where}{first['msg']}; or start with --generation-config openai"
        ) from None
