"""The engine behind LitServe, and OpenAI's API in front of it."""
