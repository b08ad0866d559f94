"""What any server of steered models needs and no engine knows: names and content, the default, memory, metrics."""
