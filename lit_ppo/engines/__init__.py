"""What samples responses: the interface, and other programs such as vLLM."""
