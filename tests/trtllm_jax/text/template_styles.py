"""Small chat templates, each written in the style of a family: what they read differs as theirs does."""

_TOOLS = "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"

STYLES: dict[str, str] = {
    # Qwen 2.5, Hermes: text, objects, content is optional.
    "object": _TOOLS
    + """
{%- for m in messages %}
  {{- '<|im_start|>' + m.role + '\n' }}
  {%- if m.content %}{{ m.content }}{% endif %}
  {%- for call in m.tool_calls or [] %}
    {%- if call.function %}{% set call = call.function %}{% endif %}
    {{- '<tool_call>{"name": "' + call.name + '", "arguments": ' }}{{ call.arguments | tojson }}{{ '}</tool_call>' }}
  {%- endfor %}
  {{- '<|im_end|>\n' }}
{%- endfor %}""",
    # Qwen 3: looks into the text, takes both kinds of arguments.
    "either arguments": _TOOLS
    + """
{%- for m in messages %}
  {%- set content = m.content %}
  {%- if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}
  {{- '<|im_start|>' + m.role + '\n' + content }}
  {%- for call in m.tool_calls or [] %}
    {{- '<tool_call>{"name": "' ~ call.function.name ~ '", "arguments": ' }}
    {%- if call.function.arguments is string %}{{ call.function.arguments }}
    {%- else %}{{ call.function.arguments | tojson }}{% endif %}
    {{- '}</tool_call>' }}
  {%- endfor %}
  {{- '<|im_end|>\n' }}
{%- endfor %}""",
    # SmolLM2, Zephyr: knows no calls; joins content whatever it is.
    "no calls": "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '</s>' }}{% endfor %}",
    # Zephyr, TinyLlama: three roles, and nothing of others.
    "three roles": """
{%- for m in messages %}
  {%- if m['role'] == 'user' %}{{ '<|user|>' + m['content'] }}
  {%- elif m['role'] == 'system' %}{{ '<|system|>' + m['content'] }}
  {%- elif m['role'] == 'assistant' %}{{ '<|assistant|>' + m['content'] }}{% endif %}
{%- endfor %}""",
    # Llama 2: turns alternate, and a first system message joins the user's.
    "turns": """
{%- set first = messages[0]['role'] == 'system' %}
{%- for m in (messages[1:] if first else messages) %}
  {%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns must alternate') }}{% endif %}
  {%- if loop.first and first %}{% set text = '<<SYS>>' + messages[0]['content'] + '<</SYS>>' + m['content'] %}
  {%- else %}{% set text = m['content'] %}{% endif %}
  {%- if m['role'] == 'user' %}{{ '[INST] ' + text | trim + ' [/INST]' }}
  {%- elif m['role'] == 'assistant' %}{{ ' ' + text + ' </s>' }}{% endif %}
{%- endfor %}""",
    # R1's distillations: joins arguments as text.
    "text": """
{%- for m in messages %}
  {%- if m['role'] == 'assistant' and m['tool_calls'] is defined %}
    {{- '[SAY]' + m['content'] }}
    {%- for c in m['tool_calls'] %}
      {{- '[CALL]' + c['type'] + '[SEP]' + c['function']['name'] + '\n' + c['function']['arguments'] + '[END]' }}
    {%- endfor %}
  {%- else %}{{ '[' + m['role'] + ']' + m['content'] }}{% endif %}
{%- endfor %}""",
    # Prints whatever it gets: an object would look like Python's.
    "printed": """
{%- for m in messages %}[{{ m.role }}]{{ m.content }}
  {%- for c in m.tool_calls or [] %}<{{ c.function.name }}>{{ c.function.arguments }}</>{% endfor %}
{%- endfor %}""",
    # DeepSeek V3: calls are written where content is none, and text where it is not.
    "null with calls": """
{%- set ns = namespace(system='') %}
{%- for m in messages if m.role == 'system' %}{% set ns.system = ns.system + m.content %}{% endfor %}{{ ns.system }}
{%- for m in messages %}
  {%- if m['role'] == 'user' %}{{ '<User>' + m['content'] }}{% endif %}
  {%- if m['role'] == 'assistant' and m['content'] is none %}
    {%- for c in m['tool_calls'] %}
      {{- '<calls>' + c['type'] + c['function']['name'] + c['function']['arguments'] }}
    {%- endfor %}
  {%- endif %}
  {%- if m['role'] == 'assistant' and m['content'] is not none %}{{ '<Assistant>' + m['content'] + '<end>' }}{% endif %}
  {%- if m['role'] == 'tool' %}{{ '<output>' + m['content'] }}{% endif %}
{%- endfor %}""",
    # Calls are written where there is no content at all.
    "absent with calls": """
{%- for m in messages %}[{{ m.role }}]
  {%- if 'content' in m %}{{ m.content }}
  {%- else %}{% for c in m.tool_calls %}{{ c.function.name + c.function.arguments | tojson }}{% endfor %}{% endif %}
{%- endfor %}""",
    # Llama 3.1: one call a message, no text beside it, results as JSON.
    "one call": """
{%- for m in messages %}
  {%- if not (m.role == 'tool' or 'tool_calls' in m) %}<h>{{ m.role }}</h>{{ m['content'] | trim }}<|eot_id|>
  {%- elif 'tool_calls' in m %}
    {%- if m.tool_calls | length != 1 %}{{ raise_exception('one call at once') }}{% endif %}
    {%- set call = m.tool_calls[0].function %}
    {{- '<h>assistant</h>{"name": "' + call.name + '", "parameters": ' }}{{ call.arguments | tojson }}}<|eot_id|>
  {%- else %}<h>ipython</h>
    {%- if m.content is iterable %}{{ m.content | tojson }}{% else %}{{ m.content }}{% endif %}<|eot_id|>
  {%- endif %}
{%- endfor %}""",
    # Mistral: ids of nine characters, turns that alternate, no system messages.
    "short ids": """
{%- set ns = namespace(i=0) %}
{%- for m in messages if m.role == 'user' or (m.role == 'assistant' and not m.tool_calls) %}
  {%- if (m.role == 'user') != (ns.i % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
  {%- set ns.i = ns.i + 1 %}
{%- endfor %}
{%- for m in messages %}
  {%- if m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}
  {%- elif m.tool_calls %}[TOOL_CALLS]
    {%- for call in m.tool_calls %}
      {%- if call.id is not defined or call.id | length != 9 %}{{ raise_exception('ids have length 9') }}{% endif %}
      {{- call.function | tojson }}{{ call.id }}
    {%- endfor %}
  {%- elif m.role == 'assistant' %}{{ m.content + '</s>' }}
  {%- elif m.role == 'tool' %}
    {%- if m.tool_call_id | length != 9 %}{{ raise_exception('ids have length 9') }}{% endif %}
    {{- '[RESULT]' + m.content + m.tool_call_id }}
  {%- else %}{{ raise_exception('Only user and assistant roles are supported') }}{% endif %}
{%- endfor %}""",
    # Mistral Small: ids of nine characters at least, of which it takes the last; a first system message.
    "ids of some length": """
{%- if messages[0].role == 'system' %}{% set rest = messages[1:] %}[SYSTEM]{{ messages[0].content }}
{%- else %}{% set rest = messages %}{% endif %}
{%- for m in rest %}
  {%- if m.role == 'system' %}{{ raise_exception('no system message here') }}{% endif %}
  {%- if m.tool_calls is defined %}[SAYS]{{ m.content }}[TOOL_CALLS]
    {%- for call in m.tool_calls %}
      {%- if call.id | length < 9 %}{{ raise_exception('ids have length >= 9') }}{% endif %}
      {{- (call.function | tojson)[:-1] + ', "id": "' + call.id[-9:] + '"}' }}
    {%- endfor %}
  {%- elif m.role == 'tool' %}
    {%- if m.tool_call_id | length < 9 %}{{ raise_exception('ids have length >= 9') }}{% endif %}
    {{- '[RESULT]' + m.content | string + m.tool_call_id[-9:] }}
  {%- else %}{{ '[' + m.role + ']' + m.content }}{% endif %}
{%- endfor %}""",
    # SmolVLM, Idefics: content is a list of parts and nothing else.
    "parts": """
{%- for m in messages %}<{{ m.role }}>
  {%- for part in m['content'] %}
    {%- if part['type'] == 'text' %}{{ part['text'] }}{% elif part['type'] == 'image' %}<image>{% endif %}
  {%- endfor %}
  {%- for c in m.tool_calls or [] %}
    {{- c.function.name }}({% for k, v in c.function.arguments.items() %}{{ k }}={{ v }},{% endfor %})
  {%- endfor %}
{%- endfor %}""",
    # Gemma 3: a system message joins the first user's, both kinds of content, turns alternate.
    "either content": """
{%- if messages[0]['role'] == 'system' %}
  {%- if messages[0]['content'] is string %}{% set first = messages[0]['content'] + '\n\n' %}
  {%- else %}{% set first = messages[0]['content'][0]['text'] + '\n\n' %}{% endif %}
  {%- set rest = messages[1:] %}
{%- else %}{% set first = '' %}{% set rest = messages %}{% endif %}
{%- for m in rest %}
  {%- if m.role == 'system' %}{{ raise_exception('no system messages here') }}{% endif %}
  {{- '<start_of_turn>' + m.role + '\n' + (first if loop.first else '') }}
  {%- if m.content is string %}{{ m.content | trim }}
  {%- elif m.content is iterable %}{% for part in m.content %}{{ part.text | trim }}{% endfor %}
  {%- else %}{{ raise_exception('Invalid content type') }}{% endif %}
  {%- for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}
  {{- '<end_of_turn>\n' }}
{%- endfor %}""",
    # Parts for users, text for everybody else.
    "parts of users": """
{%- macro say(content) %}{% if content is string %}{{ raise_exception('a list, please') }}{% endif %}
  {%- for part in content %}{{ part.text }}{% endfor %}{% endmacro %}
{%- for m in messages %}[{{ m.role }}]
  {%- if m.role == 'user' %}{{ say(m.content) }}{% else %}{{ '' + m.content }}{% endif %}
  {%- for c in m.tool_calls or [] %}{{ c.function.name + c.function.arguments }}{% endfor %}
{%- endfor %}""",
    # The first part, and no other.
    "one part": """
{%- for m in messages %}[{{ m.role }}]{{ m.content[0].text }}
  {%- for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}
{%- endfor %}""",
    # gpt-oss, Gemma's functions: a result says whose it is.
    "named results": """
{%- for m in messages %}
  {%- if m.role == 'tool' %}{{ '<functions.' + m.name + '>' }}{{ m.content }}
  {%- else %}{{ '<' + m.role + '>' + m.content }}{% endif %}
  {%- for c in m.tool_calls or [] %}{{ c.function.name }}
    {%- for name, value in c.function.arguments | items %}
      {{- '<p=' + name + '>' }}{{ value if value is string else value | tojson }}</p>
    {%- endfor %}
  {%- endfor %}
{%- endfor %}""",
    # Calls only where there are tools.
    "calls with tools": """
{%- for m in messages %}[{{ m.role }}]{{ m.content or '' }}
  {%- if tools and m.tool_calls %}{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}{% endif %}
{%- endfor %}""",
}

WITHOUT_CALLS = {"no calls", "three roles", "turns"}
WITHOUT_TEXT_BESIDE_CALLS = {"short ids"}
