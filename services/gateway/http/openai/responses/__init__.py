"""OpenAI's Responses API: a response is a job, and its events are derived from the job's answer."""
