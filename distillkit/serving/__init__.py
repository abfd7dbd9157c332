"""A student in vLLM: `vllm serve FOLDER` on a folder as it was saved, by vLLM's entry point for plugins."""
