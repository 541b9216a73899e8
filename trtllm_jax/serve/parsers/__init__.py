"""What a model's text means: reasoning, content and tool calls; and grammars that make a model call a tool."""
