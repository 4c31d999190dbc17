"""OpenAI's API over a nested model: checked requests, one worker that owns the model, streams."""
