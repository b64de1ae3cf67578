"""Instructor, in each of its modes for services like OpenAI's."""

import json
import sys

import instructor
import openai
from pydantic import BaseModel

URL, ASKED = sys.argv[1], json.loads(sys.argv[2])


class Weather(BaseModel):
    """The weather of a city."""

    city: str
    degrees: int


MODES = {
    "TOOLS": "typed call",
    "TOOLS_STRICT": "typed call",
    "JSON": "typed",
    "JSON_SCHEMA": "typed",
    "MD_JSON": "typed",
    "RESPONSES_TOOLS": "typed call",
}
found = {}
for name, question in MODES.items():
    mode = instructor.Mode[name]
    client = instructor.from_openai(openai.OpenAI(base_url=f"{URL}/v1", api_key="any", max_retries=0), mode=mode)
    settings = {"model": "scripted", "response_model": Weather}
    asked = [{"role": "user", "content": ASKED[question]}]
    found[f"typed: {name}"] = client.create(messages=asked, max_retries=0, **settings).model_dump()
    # An answer of the wrong type goes back with what was wrong with it.
    wrong = [{"role": "user", "content": ASKED[f"wrong {question}"]}]
    found[f"typed: {name}, at the second try"] = client.create(messages=wrong, max_retries=1, **settings).model_dump()
    *_, whole = client.create_partial(messages=asked, **settings)
    found[f"typed: {name}, streamed"] = whole.model_dump()
print(json.dumps(found))
