"""Reads what a model wrote: reasoning, tool calls, and what is left for the user.

Each family of models marks them in its own way (`AnswerFormat`). A text is read as it comes, and
what was read stays: whole and streamed answers are the same. Text that looks like a tool call but
is not valid stays content, so nothing is lost.
"""
