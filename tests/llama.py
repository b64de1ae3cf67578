"""A chat template that writes conversations as Llama 3.1's does, in words of its own, and a tokenizer with it."""

from transformers import PreTrainedTokenizerFast

from server.output.llama import TAG
from tests.live import byte_tokenizer

HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>")
TEMPLATE = """
{%- set calling %}
Here are functions as JSON schemas. Answer with {"name": its name, "parameters": its arguments} to call one.
{% for tool in tools or [] %}{{ tool | tojson(indent=4) }}

{% endfor %}
{%- endset %}
{%- macro turn(role, content) -%}
<|start_header_id|>{{ role }}<|end_header_id|>

{{ content }}<|eot_id|>
{%- endmacro %}
{%- set state = namespace(untold=tools) %}
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {%- if message.tool_calls | length != 1 %}
            {{- raise_exception("one call a turn") }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {%- set arguments = call.arguments | tojson %}
        {{- turn("assistant", '{"name": "' + call.name + '", "parameters": ' + arguments + "}") }}
    {%- elif message.role == "tool" %}
        {{- turn("ipython", message.content | tojson) }}
    {%- elif message.role == "user" and state.untold %}
        {{- turn("user", calling + message.content | trim) }}
        {%- set state.untold = none %}
    {%- else %}
        {{- turn(message.role, message.content | trim) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|start_header_id|>assistant<|end_header_id|>\n\n" }}
{%- endif %}
"""


def llama_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer(TEMPLATE, HEADERS)
    tokenizer.add_special_tokens({"additional_special_tokens": [TAG]})
    return tokenizer
