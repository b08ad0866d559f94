"""Every change made to vLLM, as a table of decorated functions, and the one machine that puts them in."""
