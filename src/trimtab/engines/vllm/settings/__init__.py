"""What an operator says of an engine: flags, settings, their check against vLLM's configuration, and the stamp."""
