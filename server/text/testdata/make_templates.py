#!/usr/bin/env python3
"""Writes templates.json: chat templates of ours, conversations, and what Python's Jinja2 renders.

    pip install jinja2==3.1.6 && python make_templates.py

The environment is the one `transformers` builds: immutable sandbox, trim_blocks, lstrip_blocks, loop controls, tojson
without ASCII escaping, raise_exception, strftime_now (at a fixed time here). Cases are
{"template": index, "context": index, "output": text} or {…, "error": true}.
"""
import datetime
import json
import pathlib

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

NOW = 1717761600  # 2024-06-07 12:00:00 UTC


def environment():
    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda f: datetime.datetime.fromtimestamp(NOW, datetime.timezone.utc).strftime(f)
    return env


# Whole templates, each with the constructs of one family.
CHATML = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful assistant.<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""

THINKING = r"""{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\n\n' }}
    {%- endif %}
    {{- "# Tools\n<tools>" }}
    {%- for tool in tools %}
        {{- "\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\n</tools>\n{\"name\": <name>}<|im_end|>\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(looking=true, last_query=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.looking and message.role == "user" and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.looking = false %}
        {%- set ns.last_query = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content or '' %}
        {%- set thoughts = '' %}
        {%- if message.reasoning_content is defined and message.reasoning_content is not none %}
            {%- set thoughts = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thoughts = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query and (loop.last or thoughts) %}
            {{- '<|im_start|>' + message.role + '\n<think>\n' + thoughts.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\n' + content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if (loop.first and content) or (not loop.first) %}
                {{- '\n' }}
            {%- endif %}
            {%- if tool_call.function %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '<tool_call>\n{"name": "' ~ tool_call.name ~ '", "arguments": ' }}
            {{- tool_call.arguments if tool_call.arguments is string else tool_call.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' }}
        {{- message.content }}
        {{- '\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}
"""

INST = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace() %}
{%- set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("roles must alternate user/assistant") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[TOOLS][" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {%- for key, val in tool.items() if key != "return" %}
                    {{- '"' + key + '": ' + (val if val is string else val|tojson) }}
                    {%- if not loop.last %}{{- ", " }}{%- endif %}
                {%- endfor %}
                {{- ", " if not loop.last else "]" }}
            {%- endfor %}
            {{- "[/TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[CALLS][" }}
        {%- for tool_call in message.tool_calls %}
            {%- set out = tool_call.function|tojson %}
            {{- out[:-1] }}
            {%- if not tool_call.id is defined or tool_call.id|length != 9 %}
                {{- raise_exception("ids have nine characters") }}
            {%- endif %}
            {{- ', "id": "' + tool_call.id + '"}' }}
            {{- ", " if not loop.last else "]" + eos_token }}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- elif message["role"] == "tool" %}
        {{- '[RESULTS] {"content": ' + message.content|string + "}[/RESULTS]" }}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported!") }}
    {%- endif %}
{%- endfor %}
"""

HEADERS = """{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{#- The system message goes into its own place. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if builtin_tools is defined %}
    {{- "Tools: " + builtin_tools | reject('equalto', 'code_interpreter') | join(", ") + "\\n\\n"}}
{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{%- if tools %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("one call at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {%- for arg_name, arg_val in tool_call.arguments | items %}
            {{- arg_name + '="' + arg_val|string + '"' }}
            {%- if not loop.last %}
                {{- ", " }}
            {%- endif %}
        {%- endfor %}
        {{- "<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

FULLWIDTH = """{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{% set ns = namespace(is_first=false, is_tool=false, system_prompt='', is_first_sp=true) %}{%- for message in messages %}{%- if message['role'] == 'system' %}{%- if ns.is_first_sp %}{% set ns.system_prompt = ns.system_prompt + message['content'] %}{% set ns.is_first_sp = false %}{%- else %}{% set ns.system_prompt = ns.system_prompt + '

' + message['content'] %}{%- endif %}{%- endif %}{%- endfor %}{{ bos_token }}{{ ns.system_prompt }}{%- for message in messages %}{%- if message['role'] == 'user' %}{%- set ns.is_tool = false -%}{{'<｜User｜>' + message['content']}}{%- endif %}{%- if message['role'] == 'assistant' and 'tool_calls' in message %}{%- set ns.is_tool = false -%}{%- for tool in message['tool_calls'] %}{%- if not ns.is_first %}{{'<｜Assistant｜><｜calls▁begin｜>' + tool['function']['name'] + '\\n' + '```json' + '\\n' + tool['function']['arguments']|tojson + '\\n' + '```'}}{%- set ns.is_first = true -%}{%- else %}{{'\\n' + tool['function']['name']}}{%- endif %}{%- endfor %}{{'<｜calls▁end｜>'}}{%- elif message['role'] == 'assistant' and message['content'] is not none %}{% set content = message['content'] %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}{%- endif %}{%- endfor -%}{% if add_generation_prompt and not ns.is_tool %}{{'<｜Assistant｜><think>\\n'}}{% endif %}"""

MACROS = """{#-
  A template with macros that call each other.
 #}
{%- macro render_type(spec, required, is_nullable=false) -%}
    {%- if spec.type == "array" -%}
        {%- if spec['items'] -%}
            {%- set inner = render_type(spec['items'], required) -%}
            {{- "any[]" if inner|length > 50 else inner + "[]" }}
        {%- else -%}
            {{- "any[]" }}
        {%- endif -%}
        {%- if spec.nullable or is_nullable -%}{{- " | null" }}{%- endif -%}
    {%- elif spec.type is defined and spec.type is iterable and spec.type is not string and spec.type is not mapping and spec.type[0] is defined -%}
        {{- spec.type | join(" | ") }}
    {%- elif spec.type == "string" -%}
        {%- if spec.enum -%}
            {{- '"' + spec.enum|join('" | "') + '"' -}}
        {%- else -%}
            {{- "string" }}
        {%- endif -%}
    {%- elif spec.type in ["number", "integer"] -%}
        {{- "number" }}
    {%- elif spec.type == "object" -%}
        {%- if spec.properties -%}
            {{- "{\\n" }}
            {%- for prop, prop_spec in spec.properties.items() -%}
                {{- prop -}}
                {%- if prop not in (spec.required or []) -%}
                    {{- "?" }}
                {%- endif -%}
                {{- ": " }}
                {{ render_type(prop_spec, spec.required or []) }}
                {%- if not loop.last -%}
                    {{-", " }}
                {%- endif -%}
            {%- endfor -%}
            {{- "}" }}
        {%- else -%}
            {{- "object" }}
        {%- endif -%}
    {%- else -%}
        {{- "any" }}
    {%- endif -%}
{%- endmacro -%}
{%- macro system() -%}
    {%- if identity is not defined %}
        {%- set identity = "You are a switch." %}
    {%- endif %}
    {{- identity + "\\n" }}
    {{- "Date: " + strftime_now("%Y-%m-%d") + "\\n" }}
    {%- if tools -%}
        {{- "\\nTools go to 'functions'." }}
    {%- endif -%}
{%- endmacro -%}
{{- "<|start|>system<|message|>" }}
{{- system() }}
{{- "<|end|>" }}
{%- if tools %}
    {%- for tool in tools %}
        {%- set tool = tool.function %}
        {{- "// " + tool.description + "\\n" }}
        {{- "type "+ tool.name + " = " }}
        {%- if tool.parameters and tool.parameters.properties %}
            {{- "(_: " + render_type(tool.parameters, []) + ") => any;\\n" }}
        {%- else -%}
            {{- "() => any;\\n" }}
        {%- endif -%}
    {%- endfor %}
{%- endif %}
{%- set last_call = namespace(name=none) %}
{%- for message in messages -%}
    {%- if message.role == 'assistant' -%}
        {%- if "tool_calls" in message %}
            {%- set future = namespace(found=false) %}
            {%- for later in messages[loop.index:] %}
                {%- if later.role == 'assistant' and "tool_calls" not in later %}
                    {%- set future.found = true %}
                {%- endif %}
            {%- endfor %}
            {%- set last_call.name = message.tool_calls[0].function.name %}
            {{- "<|start|>assistant to=functions." + last_call.name ~ future.found }}
        {%- else %}
            {{- "<|start|>assistant<|message|>" + message.content + "<|end|>" }}
            {%- set last_call.name = none %}
        {%- endif %}
    {%- elif message.role == 'tool' -%}
        {%- if last_call.name is none %}
            {{- raise_exception("no call came before") }}
        {%- endif %}
        {{- "<|start|>functions." + last_call.name + "<|message|>" + message.content|tojson + "<|end|>" }}
    {%- else -%}
        {{- "<|start|>" ~ message.role ~ "<|message|>" ~ message.content ~ "<|end|>" }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|start|>assistant
{%- endif -%}
"""

SNIPPETS = r"""a{% if true %}b{% endif %}c
  {% if true %}
    x
  {% endif %}
y
{%- if true -%}   z   {%- endif -%}   w
{%+ if true %}keep{% endif +%}
 end
a {# comment #} b {#- left -#} c
{% raw %}{{ not }} {% parsed %}{% endraw %}!
  {%- raw -%}  {{ x }}  {%- endraw -%}  !
{{ 1 + 2 * 3 - 4 // 3 }} {{ 7 % 3 }} {{ -7 // 2 }} {{ -7 % 3 }} {{ 7 / 2 }} {{ 2 ** 10 }} {{ 2 ** -1 }} {{ 1e3 }} {{ 0x1F }} {{ 1_000 }}
{{ 1.0 }} {{ 0.1 + 0.2 }} {{ 1e16 }} {{ 1e-5 }} {{ 123456789.125 }} {{ 1e22 }} {{ 5 // 2.0 }} {{ -5.5 % 2 }} {{ 3.0 * 2 }}
{{ 1 < 2 < 3 }} {{ 1 < 2 > 3 }} {{ 1 == 1.0 }} {{ "a" != "b" }} {{ "a" < "b" }} {{ [1,2] == [1,2] }} {{ (1,2) == [1,2] }}
{{ not true or true and false }} {{ not (true and false) }} {{ none or "x" }} {{ 0 and 1 }} {{ "" or [] or "last" }}
{{ "a" ~ 1 ~ none ~ true ~ 1.5 ~ [1] }} {{ "a" + "b" * 3 }} {{ [1] + [2] }} {{ [1, 2] * 2 }} {{ "-" * 5 }}
{{ "x" in "xyz" }} {{ "q" not in "xyz" }} {{ 1 in [1, 2] }} {{ "k" in {"k": 1} }} {{ 2 not in (1, 3) }} {{ "a" in undefined_thing }}
{{ "abc"[0] }}{{ "abc"[-1] }}{{ "abcdef"[1:4] }}{{ "abcdef"[::-1] }}{{ "abcdef"[::2] }}{{ "abcdef"[-2:] }}{{ "abcdef"[4:1:-1] }}|{{ "é日本"[1:] }}
{{ [1,2,3,4][1:] }} {{ [1,2,3,4][:-1] }} {{ [1,2,3,4][::-1] }} {{ [1,2,3][10:] }} {{ [1,2,3][5] is defined }} {{ (1,2,3)[:2] }} {{ [1,2,3,4,5][-2::-2] }}
{{ "yes" if 1 else "no" }} {{ "yes" if 0 else "no" }} [{{ "yes" if 0 }}] {{ 1 if 0 else 2 if 0 else 3 }}
{% set x = 1 %}{% if x == 1 %}one{% elif x == 2 %}two{% else %}many{% endif %} {% set x = x + 1 %}{{ x }}
{% for i in [1,2,3] %}{{ loop.index }}{{ loop.index0 }}{{ loop.revindex }}{{ loop.revindex0 }}{{ loop.first }}{{ loop.last }}{{ loop.length }} {% endfor %}
{% for i in [] %}x{% else %}empty{% endfor %} {% for i in [1,2,3,4] if i is even %}{{ i }}/{{ loop.length }} {% else %}none{% endfor %}
{% for i in range(10) %}{% if i == 2 %}{% continue %}{% endif %}{% if i == 5 %}{% break %}{% endif %}{{ i }}{% endfor %}
{% for k, v in {"a": 1, "b": [2]}.items() %}{{ k }}={{ v }};{% endfor %} {% for k in {"a": 1, "b": 2} %}{{ k }}{% endfor %} {% for c in "añ日" %}{{ c }}.{% endfor %}
{% for (a, b) in [[1,2],[3,4]] %}{{ a }}{{ b }}{% endfor %}
{% for i in [1,2,3] %}{{ loop.previtem }}<{{ i }}>{{ loop.nextitem }} {{ loop.cycle("odd", "even") }} {% if loop.changed(i // 2) %}new{% endif %} {% endfor %}
{% set x = 1 %}{% for i in [1,2] %}{{ x }}{% set x = 5 %}{{ x }}{% endfor %}{{ x }}
{% set ns = namespace(a=1, b="x") %}{% for i in range(3) %}{% set ns.a = ns.a + i %}{% endfor %}{{ ns.a }}{{ ns.b }} {{ ns.missing is defined }}
{% set a, b = 1, 2 %}{{ a }}{{ b }} {% set (c, d) = [3, 4] %}{{ c }}{{ d }}
{% set block %}in {{ 1 + 1 }}
 block{% endset %}[{{ block }}] {% set up | upper | trim %} abc {% endset %}[{{ up }}]
{% filter upper %}loud {{ "words" }}{% endfilter %} {% with q = 5, r = 6 %}{{ q }}{{ r }}{% endwith %}{{ q is defined }}
{% macro m(a, b=2, c="z") %}<{{ a }}{{ b }}{{ c }}>{% endmacro %}{{ m(1) }}{{ m(1, 3) }}{{ m(a=4, c=5) }}{{ m() }} {{ m(1)|length }}
{% macro fact(n) %}{{ 1 if n < 2 else n * fact(n - 1)|int }}{% endmacro %}{{ fact(6) }}
{% set outer = "seen" %}{% macro look() %}{{ outer }}{% set outer = "inner" %}{{ outer }}{% endmacro %}{{ look() }}{{ outer }}
{{ "  trim me \n" | trim }}|{{ "xxaxx" | trim("x") }}|{{ "abc" | upper }}|{{ "ÀÉ" | lower }}|{{ "hello wORLD foo-bar" | title }}|{{ "hELLO" | capitalize }}
{{ [1,2,3] | length }} {{ "日本" | length }} {{ {"a":1} | length }} {{ undefined_thing | length }} {{ [3,1,2] | sort }} {{ ["b","A","c"] | sort }} {{ ["b","A","c"] | sort(case_sensitive=true) }} {{ [1,2,3] | sort(reverse=true) }}
{{ [1,2,3] | first }} {{ [1,2,3] | last }} {{ "abc" | first }} {{ "abc" | last }} {{ [] | first is defined }} {{ [1,2,3] | join("-") }} {{ ["a", 1, none] | join }} {{ [{"n": "x"}, {"n": "y"}] | join("+", attribute="n") }}
{{ undefined_thing | default("d") }} {{ "" | default("d") }} {{ "" | default("d", true) }} {{ none | default("d") }} {{ undefined_thing | d(1) }} {{ false | default("x", boolean=true) }}
{{ "abc" | list }} {{ {"b": 2, "a": 1} | dictsort }} {{ {"b": 1, "a": 2} | dictsort(by="value") }} {{ {"b": 2, "A": 1} | dictsort(true) }} {{ {"b": 2, "a": 1} | items | list }} {{ {"b": 2, "a": 1} | list }}
{{ ["a", "b"] | map("upper") | list }} {{ [{"x": {"y": 1}}, {"x": {"y": 2}}] | map(attribute="x.y") | list }} {{ [{"x": 1}, {}] | map(attribute="x", default=0) | list }} {{ ["1", "2"] | map("int") | sum }}
{{ [1,2,3,4] | select("odd") | list }} {{ [1,2,3,4] | reject("odd") | list }} {{ [0, 1, "", "a"] | select | list }} {{ [1,2,3] | select("gt", 1) | list }} {{ [{"r": "u", "n": 1}, {"r": "a", "n": 2}] | selectattr("r", "equalto", "u") | map(attribute="n") | list }} {{ [{"r": "u"}, {"q": 1}] | rejectattr("r") | list }} {{ [{"r": "u"}, {"q": 1}] | selectattr("r", "defined") | list }}
{{ "a-b-c" | replace("-", "+") }} {{ "a-b-c" | replace("-", "+", 1) }} {{ "aaa" | replace("a", "aa") }} {{ "abc".replace("", "-") }} {{ "3" | int }} {{ "x" | int }} {{ "x" | int(7) }} {{ 3.9 | int }} {{ "3.9" | int }} {{ "ff" | int(base=16) }} {{ "2.5" | float }} {{ "q" | float }} {{ 3 | float }}
{{ 3 | string + "x" }} {{ [1, "a", none, true, {"k": 'q"\''}] | string }} {{ "a\nb\t\\ '\" é \x00 \u200b" | list | string }} {{ ("a",) }} {{ () }} {{ {} }} {{ {"a": (1, 2)} }}
{{ -3 | abs }} {{ (-3) | abs }} {{ 2.567 | round }} {{ 2.567 | round(2) }} {{ 2.5 | round }} {{ 3.5 | round }} {{ 2.1 | round(method="ceil") }} {{ 2.9 | round(0, "floor") }} {{ [1,5,3] | max }} {{ [1,5,3] | min }} {{ ["b","A"] | min }} {{ [1,2,3] | sum }} {{ [1,2] | sum(start=10) }} {{ [] | max is defined }}
{{ [1,2,1,3,2] | unique | list }} {{ ["a","A","b"] | unique | list }} {{ "abc" | reverse }} {{ [1,2,3] | reverse | list }} {{ "line1\nline2\n\nline4" | indent }} {{ "a\nb" | indent(2, true) }} {{ "a\n\nb" | indent(width="> ", blank=true) }}
{{ "%s is %d years, %.2f%%" | format("Ann", 30, 1.5) }} {{ "%s-%s" % ("a", 1) }} {{ "<b>" | safe }} {{ [{"g": 1, "n": "a"}, {"g": 2, "n": "b"}, {"g": 1, "n": "c"}] | groupby("g") | map("first") | list }} {{ {"a": 1} | attr("items") is callable }}
{{ {"a": [1, 2.5, none, true, "é\n\"\\\u0001\u007f"], "b": {}, "c": []} | tojson }} {{ "x<y>&'" | tojson }} {{ {"b": 1, "a": {"d": [1], "e": {}}} | tojson(indent=2) }} {{ {"b": 1, "a": 2} | tojson(sort_keys=true, separators=(",", ":")) }} {{ "日本é😀" | tojson(ensure_ascii=true) }} {{ [1] | tojson(indent=0) }} {{ {1: 2, true: 3} | tojson }}
{{ x is defined }} {{ x is undefined }} {{ none is none }} {{ 1 is number }} {{ 1.5 is number }} {{ true is number }} {{ 1 is integer }} {{ true is integer }} {{ 1.5 is float }} {{ true is boolean }} {{ "s" is string }} {{ [] is string }} {{ {} is mapping }} {{ [] is mapping }} {{ [] is sequence }} {{ "s" is sequence }} {{ 1 is sequence }} {{ {} is iterable }} {{ 1 is iterable }} {{ true is true }} {{ 1 is true }} {{ false is false }} {{ range is callable }}
{{ 1 is odd }} {{ 2 is even }} {{ 9 is divisibleby 3 }} {{ 9 is divisibleby(2) }} {{ 1 is eq 1 }} {{ 1 is ne 2 }} {{ 1 is lt 2 }} {{ 2 is ge 2 }} {{ 1 is in [1,2] }} {{ "abc" is lower }} {{ "ABC" is upper }} {{ 1 is not none }} {{ 1 is sameas 1 }} {{ "a" is equalto "a" }} {{ not 1 is odd }}
{{ "  a b  ".strip() }}|{{ "  a ".lstrip() }}|{{ " a  ".rstrip() }}|{{ "xxaxx".strip("x") }}|{{ "a,b,c".split(",") }}|{{ "a b  c".split() }}|{{ "a,b,c".split(",", 1) }}|{{ "a,b,c".rsplit(",", 1) }}|{{ "a b c d".split(none, 2) }}|{{ "".split() }}|{{ "".split(",") }}
{{ "abc".startswith("a") }} {{ "abc".endswith(("x", "c")) }} {{ "abc".upper() }} {{ "they're bill's".title() }} {{ "ABC".lower() }} {{ "hello".capitalize() }} {{ ",".join(["a", "b"]) }} {{ "abcabc".find("c") }} {{ "abcabc".rfind("c") }} {{ "abc".find("z") }} {{ "aXbX".count("X") }} {{ "123".isdigit() }} {{ "abc".isalpha() }} {{ "a1".isalnum() }} {{ " ".isspace() }} {{ "l1\nl2\r\nl3".splitlines() }} {{ "prefix-x".removeprefix("prefix-") }} {{ "x.py".removesuffix(".py") }}
{{ {"a": 1}.get("a") }} {{ {"a": 1}.get("b") }} {{ {"a": 1}.get("b", 2) }} {{ {"a": 1, "b": 2}.keys() | list }} {{ {"a": 1}.values() | list }} {{ {"items": 3}["items"] }} {{ {"x": 1}.x }} {{ {"x": 1}["y"] is defined }} {{ {"x": {"y": [5]}}.x.y[0] }} {{ dict(a=1, b="c") }} {{ dict([("p", 1)]) }} {{ [1, 2, 2].count(2) }} {{ [1, 2].index(2) }}
{{ undefined_thing }}{{ none }}{{ true }}{{ undefined_thing is defined and undefined_thing.x }} {{ {"a": none}.a.b is defined }} {{ (undefined_thing or {}).x is defined }}
{{ range(5) | list }} {{ range(2, 8, 3) | list }} {{ range(3, 0, -1) | list }} {{ "nested 'quotes' \"here\"" }} {{ 'a\'b' }} {{ "tab\there" }} {{ "\u00e9\x41\101" }} {{ "back\\slash \d" }} {{ "con" "cat" }} {{ 'multi
line' }}
{{ strftime_now("%Y-%m-%d %H:%M:%S %B %d %j") }} {{ messages | length }} {{ messages[0].content }} {{ messages[-1]['role'] }} {{ messages | map(attribute="role") | join(",") }}
{{ messages | selectattr("role", "in", ["user", "tool"]) | list | length }} {{ (messages | first).role }} {{ messages[0].get("name", "nobody") }} {{ messages[0] is mapping }} {{ messages is sequence }}
{% if messages[0].content is string %}S{% else %}L{% endif %}{% for m in messages if m.role == "user" %}{% if loop.first %}[{% endif %}{{ m.content[:3] }}{{ "," if not loop.last else "]" }}{% endfor %}
{{- "x" -}}   y   {{- "z" }}
   {{ "indented" }}
	{%- set t = 1 %}	tab
{{ raise_exception("boom") }}
{{ undefined_thing.attribute }}
{{ 1 + "a" }}
{{ undefined_thing + 1 }}
{{ none.x.y }}
{{ [1,2] | map("nosuchfilter") | list }}
{{ 1 | nosuchfilter }}
{{ 1 is nosuchtest }}
{% if %}x{% endif %}
{% for x in %}{% endfor %}
{{ "unclosed }}
{% endfor %}
{% unknown %}
{{ (1 }}
{{ 1 // 0 }}
{{ nosuchfunction() }}
{% macro q(a) %}{% endmacro %}{{ q(1, 2) }}
{{ range(1000000) }}
{{ "a".join([1]) }}
{{ "a" < 1 }}
{{ 5 in 5 }}
{% for x in 5 %}{% endfor %}
{{ {} | tojson(indent=2) }}{{ [] | tojson(indent=2) }}{{ [[]] | tojson(indent=2) }}
{% set a = [1, 2, 3] %}{% set b = a[1:] + a[:1] %}{{ b }}{{ a }}{% set c = b | map("string") | join("") %}{{ c }}
{% for row in [[1, 2], [3, 4]] %}{% for cell in row %}{{ loop.index }}:{{ cell }}{% if not loop.last %},{% endif %}{% endfor %};{% endfor %}
{% set ns = namespace(out="") %}{% for m in messages %}{% set ns.out = ns.out ~ m.role[0] %}{% endfor %}{{ ns.out }}
{{ ["x"] if not tools else tools[0].function.name }} {{ tools is none }} {{ tools is not none and tools | length }} {{ (tools or []) | length }}
{{ "a" if add_generation_prompt else "b" }} {{ bos_token ~ eos_token }} {{ bos_token is defined }}
{{ messages[0]["content"].split("\n") | first | trim }} {{ messages[0].content | replace("\n", " ") | upper }} {{ messages[0].content.split(" ")[::-1] | join(" ") }}
{{ "ẞßſİ" | upper }} {{ "É" | lower }} {{ "x" ~ ("y" | upper) ~ "z" }} {{ 10 / 4 | int }} {{ -2 ** 2 }} {{ 2 ** 3 ** 2 }} {{ - 5 | abs }}
{{ 1.5e300 * 1e10 }} {{ 100000000000000000 }} {{ 12345678901234567.0 }} {{ 1e100 }} {{ 0.0001 }} {{ 0.00001 }} {{ 123e-7 }} {{ -0.0 }}
{%- for a in [1] %}{% set z = a %}{% endfor %}{{ z is defined }}
{% set f = "x" %}{% if true %}{% set f = "y" %}{% endif %}{{ f }}
{% macro outer_m() %}{% for i in [1,2] %}{{ inner_m(i) }}{% endfor %}{% endmacro %}{% macro inner_m(v) %}({{ v }}){% endmacro %}{{ outer_m() }}
{{ "a,b;c".replace(",", ";").split(";") | join("|") }} {{ ("a" ~ "b") | length }} {{ not "" }} {{ "0" | int == 0 }} {{ 3 in [1, 2] or 4 in [4] }}
{{ [1, [2, [3, {"k": [4]}]]] }} {{ [1, [2]] == [1, [2]] }} {{ {"a": 1} == {"a": 1.0} }} {{ "x" == 1 }} {{ none == false }} {{ undefined_thing == none }} {{ undefined_thing == other_undefined }}""".split("\n{")
SNIPPETS = [SNIPPETS[0]] + ["{" + s for s in SNIPPETS[1:]]
SNIPPETS += [  # whitespace control over several lines
    "a\n{% if true %}\n{% endif %}\nb\n", "a\n  {% for i in [1,2] -%}\n  {{ i }}\n{%- endfor %}|\n\n", "{{ 1 }}\n{{ 2 }}\n\n",
    "  {# c #}  \n x {# d #}\n\n{#- e -#}\n y", "\t{% set a = 1 %}\n\n{{ a }}  {% if a %}  \n  z{% endif %}\n", "a\r\nb\rc\n",
    "x {%- if true %} y {% endif -%} z", "{%- set a = 1 -%}\n\n  {{- a -}}  \n", "  {%+ if true %}p{%+ endif %}\nq", "{% if true +%}\nr{% endif %}",
    "{% for m in messages %}\n{{ m.role }}: {{ m.content }}\n{% endfor %}\n", "{% raw %}\n  {{ a }}\n{% endraw %}\nb", "   {{ 1 }}\n\t{% if 1 %}2{% endif %}",
]

SYSTEM = {"role": "system", "content": "  You are terse.\n"}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "description": "Weather for a place", "parameters": {
    "type": "object", "required": ["city"], "properties": {
        "city": {"type": "string", "description": "Stadt <é>"}, "unit": {"type": "string", "enum": ["c", "f"]},
        "days": {"type": "array", "items": {"type": "integer"}}, "any": {"type": ["string", "null"]},
        "deep": {"type": "object", "properties": {"x": {"type": "number"}}}}}}},
    {"type": "function", "function": {"name": "now", "description": "The time", "parameters": {}}}]
CALL = {"role": "assistant", "content": "", "tool_calls": [
    {"id": "abcdefghi", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Köln \"x\"", "days": [1, 2], "deep": {"x": 1.5, "y": None}}}}]}
RESULT = {"role": "tool", "tool_call_id": "abcdefghi", "content": "{\"temp\": 21}"}


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **kw):
    return {"role": "assistant", "content": text, **kw}


BASE = {"bos_token": "<s>", "eos_token": "</s>", "tools": None, "documents": None, "add_generation_prompt": True}
CONTEXTS = [
    {**BASE, "messages": [user("Hi there")]},
    {**BASE, "messages": [SYSTEM, user("What is 1 + 1?\nThink."), assistant("<think>\nsum\n</think>\n\n2"), user("  日本語 😀 <|im_end|> </s> ")]},
    {**BASE, "add_generation_prompt": False, "messages": [user("a"), assistant(" b \n")]},
    {**BASE, "tools": TOOLS, "messages": [SYSTEM, user("Weather?"), CALL, RESULT, assistant("21 degrees"), user("Thanks")]},
    {**BASE, "tools": TOOLS, "messages": [user("Weather?"), CALL, RESULT, RESULT], "enable_thinking": False},
    {**BASE, "messages": [assistant("first", reasoning_content="\nhm\n"), assistant("second"), user("x")], "builtin_tools": ["code_interpreter", "search", "wolfram"], "identity": "Custom."},
    {**BASE, "messages": [user("x"), user("y")], "date_string": "1 Jan 2000"},
]


def main():
    env = environment()
    families = [CHATML, THINKING, INST, HEADERS, FULLWIDTH, MACROS]
    templates = families + SNIPPETS
    cases = []
    for t, source in enumerate(templates):
        for c in range(len(CONTEXTS)) if t < len(families) or "messages" in source or "tools" in source else [0]:
            case = {"template": t, "context": c}
            try:
                case["output"] = env.from_string(source).render(**CONTEXTS[c])
            except Exception:  # whatever Jinja2 or Python raise is an error of ours, too
                case["error"] = True
            cases.append(case)
    out = {"now_unix_seconds": NOW, "templates": templates, "contexts": CONTEXTS, "cases": cases}
    path = pathlib.Path(__file__).parent / "templates.json"
    path.write_text(json.dumps(out, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")
    print(len(templates), "templates,", len(cases), "cases,", sum("error" in c for c in cases), "errors")


if __name__ == "__main__":
    main()
